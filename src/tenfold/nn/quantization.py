"""Weights in few bits: what formats have in common, and rounding weights that are not quantised yet.

Dims: N outputs, D inputs, G groups of inputs that share a scale.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tenfold.base.affine import Affine, blocks_of, empty_columns
from tenfold.base.errors import ConfigError
from tenfold.kernels.matmul import QuantizedWeight
from tenfold.nn.param import Param, Tree, leaves

STEPS = 16  # scales tried for each group when weights are rounded
NARROWEST = 0.7  # of the scale that reaches the group's largest weight


def from_affine(rows: Affine, dims: tuple[int, ...]) -> QuantizedWeight:
    """A checkpoint's rows as a weight for products, whose outputs are the rows; `dims` are the outputs'."""
    bits = 4 if rows.bits <= 4 and rows.inputs % 2 == 0 else 8  # two codes of 4 bits share a byte
    zero = 0 if rows.minima is not None or rows.floats else 2 ** (bits - 1)
    scales, mins = _turned(rows.scales), None if rows.minima is None else _turned(rows.minima)
    if rows.packed:
        return QuantizedWeight(codes=_turned(rows.codes), scales=scales, mins=mins, bits=bits, zero=zero, dims=dims)
    codes = rows.codes.view(np.uint8)
    if rows.floats:
        return QuantizedWeight(codes=_turned(codes), scales=scales, bits=bits, zero=zero, dims=dims, floats=True)
    return _weight(_turned(codes + np.uint8(zero) if zero else codes), scales, mins, bits, zero, dims)


def hold(p: Param, read: Sequence[Affine | np.ndarray]) -> QuantizedWeight | None:
    """What was read of a weight, one or one per source, unrounded; None if it cannot be held in few bits.

    That is so where it is not codes with scales, or where experts are quantised in different ways; and for floats of 8
    bits, but for experts': their products make numbers of one expert at a time, where others would of a whole weight,
    every time.
    """
    parts = [part for part in read if isinstance(part, Affine)]
    if len(parts) < len(read) or (parts[0].floats and p.experts is None):
        return None
    if p.experts is None:
        return jax.block_until_ready(from_affine(parts[0], p.output_dims))
    if not p.stack_dims:
        parts = [parts[0].part(expert) for expert in range(p.experts)]
    return jax.block_until_ready(stack_experts([from_affine(part, p.output_dims) for part in parts]))


def stack_experts(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """The weights of several experts as one with a leading dim; None if they are quantised in different ways."""
    if len({(w.bits, w.group, w.dims, w.floats) for w in weights}) > 1:
        return None
    if len({w.zero for w in weights}) > 1:  # minima can say what a zero point says
        weights = [replace(w, mins=w.scales * w.zero, zero=0) if w.mins is None else w for w in weights]
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *weights)


def _turned(rows: np.ndarray) -> jax.Array:
    """[N, C] as [C, N], sharing no memory with it."""
    if rows.T.flags.c_contiguous:
        return jnp.array(rows.T)
    columns = empty_columns(rows.shape, rows.dtype)
    for block in blocks_of(len(rows)):
        columns[block] = rows[block]
    return jnp.asarray(columns.T)


def pack_codes(codes: jax.Array, bits: int) -> jax.Array:
    """Codes [D, N] as a `QuantizedWeight` has them: of 4 bits, two to a byte."""
    return codes[0::2] | (codes[1::2] << 4) if bits == 4 else codes


def _weight(
    codes: jax.Array, scales: jax.Array, mins: jax.Array | None, bits: int, zero: int, dims: tuple[int, ...]
) -> QuantizedWeight:
    return QuantizedWeight(codes=pack_codes(codes, bits), scales=scales, mins=mins, bits=bits, zero=zero, dims=dims)


@dataclass(frozen=True)
class Grid:
    """How finely a weight is held: the bits of a code, how many groups of inputs have scales, and whether minima."""

    bits: int
    groups: int
    minima: bool = False

    def nbytes(self, inputs: int, outputs: int) -> int:
        bits = 4 if self.bits <= 4 and inputs % 2 == 0 else 8
        return outputs * (inputs * bits // 8 + 4 * self.groups * (2 if self.minima else 1))


@runtime_checkable
class Quantization(Protocol):
    """What says which weights are held in few bits: a `Scheme`, or the format of a checkpoint."""

    def grid(self, p: Param) -> Grid | None:
        """How a weight is held; None for a plain array."""
        ...


def nbytes(tree: Tree, dtype: DTypeLike, *quantizations: Quantization | None) -> int:
    """The bytes that a declaration tree takes, each weight as the first of `quantizations` that holds it in few bits
    does, and all others in `dtype`."""
    total = 0
    for _, p in leaves(tree):
        grids = [grid for quantization in quantizations if quantization and (grid := quantization.grid(p))]
        size, inputs = math.prod(p.shape), p.input_size
        total += grids[0].nbytes(inputs, size // inputs) if grids else size * jnp.dtype(dtype).itemsize
    return total


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded: to how many bits, and how many inputs share a scale (None: all of them).

    The products with the vocabulary are a small part of a model and the most sensitive one; they get `vocab_bits`.
    Those that choose experts are smaller still, and are not rounded.
    """

    bits: int
    group: int | None
    vocab_bits: int = 8

    def rounding(self, p: Param) -> tuple[int, int | None]:
        """The bits and the group of a weight that products use."""
        bits = self.vocab_bits if "vocab" in p.axes.split() else self.bits
        return bits, self.group if bits == self.bits else None

    def rounds(self, p: Param) -> bool:
        """Whether a weight is rounded: if products use it, but for training, and for choosing experts."""
        return bool(p.inputs) and not p.stacked and not p.routes

    def grid(self, p: Param) -> Grid | None:
        """How a weight is held; None for a plain array."""
        if not self.rounds(p):
            return None
        bits, group = self.rounding(p)
        D = p.input_size
        return Grid(bits, 1 if group is None or D % group else D // group)


SCHEMES = {"int8": Scheme(8, None), "int4": Scheme(4, 64)}


def find_scheme(name: str | None) -> Scheme | None:
    """The scheme that `--quantization` names; None for None. Raises ConfigError for what is unknown."""
    if name is None:
        return None
    if name not in SCHEMES:
        raise ConfigError(f"quantization must be one of {', '.join(SCHEMES)}; it is {name!r}")
    return SCHEMES[name]


def quantize_param(p: Param, array: jax.Array, scheme: Scheme) -> jax.Array | QuantizedWeight:
    """A loaded weight in few bits, if products use it, and else as it is."""
    if not scheme.rounds(p):
        return array
    matrix, (bits, group) = p.as_matrix(array), scheme.rounding(p)
    if p.experts is None:
        return quantize(matrix, bits, group, p.output_dims)
    stacked = stack_experts([quantize(expert, bits, group, p.output_dims) for expert in matrix])
    assert stacked is not None, "experts that are rounded alike"
    return stacked


def quantize(
    matrix: Float[Array, "D N"], bits: int, group: int | None, dims: tuple[int, ...] | None = None
) -> QuantizedWeight:
    """Rounds weights to the nearest of 2^bits - 1 multiples of a scale, symmetric about zero.

    Each group's scale is the one of a few, between what reaches its largest weight and `NARROWEST` of that, with the
    smallest squared error: a few clipped weights can be worth finer steps for all others.

    Args:
        matrix: the weights.
        bits: 4 or 8.
        group: inputs that share a scale; None, or a number that does not divide D, lets all of them.
        dims: the output dims; (N,) by default.
    """
    D, N = matrix.shape
    if bits == 4 and D % 2:
        bits = 8  # two codes of 4 bits share a byte
    whole = group is None or D % group != 0
    codes, scales = _round(matrix, bits, D if whole or group is None else group)
    return _weight(codes, scales, None, bits, 2 ** (bits - 1), dims or (N,))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _round(matrix: jax.Array, bits: int, group: int) -> tuple[jax.Array, jax.Array]:
    D, N = matrix.shape
    largest = 2 ** (bits - 1) - 1
    grouped = matrix.astype(jnp.float32).reshape(-1, group, N)
    widest = jnp.abs(grouped).max(1, keepdims=True) / largest

    def codes_of(scale: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(grouped / jnp.where(scale > 0, scale, 1)), -largest, largest)

    def attempt(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scale = widest * (1 - (1 - NARROWEST) * i / STEPS)
        error = jnp.square(grouped - codes_of(scale) * scale).sum(1, keepdims=True)
        better = error < best[1]
        return jnp.where(better, scale, best[0]), jnp.where(better, error, best[1])

    start = widest, jnp.square(grouped - codes_of(widest) * widest).sum(1, keepdims=True)
    scale, _ = jax.lax.fori_loop(1, STEPS, attempt, start) if bits < 8 else start
    codes = (codes_of(scale) + 2 ** (bits - 1)).astype(jnp.uint8).reshape(D, N)
    return codes, scale[:, 0]
