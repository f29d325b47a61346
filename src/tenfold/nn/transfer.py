"""Moving weights from views of a file to devices, with little host memory and each device getting only its part.

Checkpoints store matrices the other way round than the model wants them. What is large travels as it lies in the file,
in blocks, and the device turns it: a GPU does so a hundred times faster than numpy, a CPU no slower.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_BLOCK = 128 * 2**20  # bytes in flight at a time
_SMALL = 4 * 2**20  # up to here, compiling a program costs more than turning the array on the host
_DEVICE_DTYPES = ("float16", "bfloat16", "float32")

Piece = tuple[tuple[int, ...], np.ndarray]
"""Part of an array: where it starts, and its values."""


def place(
    parts: Sequence[np.ndarray],
    dtype: DTypeLike,
    *,
    stack_shape: tuple[int, ...] = (),
    sharding: jax.sharding.Sharding | None = None,
    release: Callable[[np.ndarray], None] = lambda view: None,
) -> jax.Array:
    """An array on its devices, finished and sharing no memory with its source.

    Args:
        parts: views in the model's dims, one for each index of the dims along which they are stacked.
        dtype: of the result.
        stack_shape: those dims, which come first; without any there is one view.
        sharding: of the result; None puts it, uncommitted, on the default device.
        release: called with each part of a view that will not be read again.
    """
    shape = (*stack_shape, *parts[0].shape)
    if sharding is None:
        return _assemble(_pieces(parts, stack_shape, tuple(map(slice, shape))), shape, dtype, None, release)
    shards: list[jax.Array] = []
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        whole = tuple(slice(*part.indices(length)) for part, length in zip(index or (), shape, strict=True))
        shard_shape = tuple(part.stop - part.start for part in whole)
        shards.append(_assemble(_pieces(parts, stack_shape, whole), shard_shape, dtype, device, release))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _pieces(parts: Sequence[np.ndarray], stack_shape: tuple[int, ...], index: tuple[slice, ...]) -> Iterator[Piece]:
    """The blocks that make up `index` of the array; starts count from the index's."""
    stack, within = index[: len(stack_shape)], index[len(stack_shape) :]
    ones = (None,) * len(stack_shape)
    chosen = np.arange(len(parts)).reshape(stack_shape)[stack]
    for place, part in np.ndenumerate(chosen):
        view = parts[int(part)][*within, ...]  # `...` keeps a scalar an array
        yield from _blocks((*place, *(0 for _ in within)), view[*ones, ...])


def _blocks(start: tuple[int, ...], view: np.ndarray) -> Iterator[Piece]:
    """Cuts a large view along the dim that is outermost in memory, so that each block is close to one run of bytes."""
    if view.nbytes <= _BLOCK:
        yield start, view
        return
    dim = max((d for d in range(view.ndim) if view.shape[d] > 1), key=lambda d: view.strides[d])
    rows = max(1, _BLOCK * view.shape[dim] // view.nbytes)
    for row in range(0, view.shape[dim], rows):
        at = (*start[:dim], start[dim] + row, *start[dim + 1 :])
        yield at, view[(slice(None),) * dim + (slice(row, row + rows),)]


def _assemble(
    pieces: Iterator[Piece],
    shape: tuple[int, ...],
    dtype: DTypeLike,
    device: Any,
    release: Callable[[np.ndarray], None],
) -> jax.Array:
    if math.prod(shape) * jnp.dtype(dtype).itemsize <= _SMALL:
        host = np.empty(shape, dtype)
        for start, view in pieces:
            host[tuple(slice(at, at + length) for at, length in zip(start, view.shape, strict=True))] = view
            release(view)
        return jax.block_until_ready(jax.device_put(host, device))
    buffer = None
    for start, view in pieces:
        stored, order = _as_stored(view)
        block = _turn(jax.device_put(stored, device), order, jnp.dtype(dtype))
        if view.shape == shape:
            buffer = block
        else:
            buffer = jnp.zeros(shape, dtype, device=device) if buffer is None else buffer
            buffer = _write(buffer, block, np.asarray(start, np.int32))
        buffer = jax.block_until_ready(buffer)
        release(view)
    assert buffer is not None
    return buffer


def _as_stored(view: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """The view with its dims in the order in which they lie in memory, and the order that turns it back."""
    stored = sorted(range(view.ndim), key=lambda dim: -view.strides[dim])
    block = view.transpose(stored)
    if block.dtype.name not in _DEVICE_DTYPES:
        block = block.astype(np.float32)
    return np.require(block, requirements=["C", "A"]), tuple(stored.index(dim) for dim in range(view.ndim))


@partial(jax.jit, static_argnames=("order", "dtype"))
def _turn(block: jax.Array, order: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return block.transpose(order).astype(dtype)


@partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    # A program of its own: fused with the turn, XLA's CPU code for it is several times slower.
    return jax.lax.dynamic_update_slice(buffer, block, tuple(start))
