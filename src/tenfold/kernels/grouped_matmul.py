"""Products of rows that are sorted by group with the weight of each group: what experts compute.

A weight is plain, [E, D, ...] with one or several output dims, or a `QuantizedWeight` or `PackedWeight` whose arrays
have a leading dim E. `reference` defines the result.

Packed weights are multiplied natively, each row as by `matmul`, to the last bit. For all others XLA's version cuts each
group's rows into tiles of one size and multiplies tile after tile, so it reads the weights of groups that have rows and
of no others. A row's result depends on the row and its weight alone: every product is of the same shape, whatever the
groups.

Dims: M rows, D inputs, N outputs, E groups, B rows of a tile.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.kernels.matmul import PackedWeight, QuantizedWeight, native_products

GroupedWeight = jax.Array | QuantizedWeight | PackedWeight

TILES = (8, 32, 128)  # rows: the smallest that a group fills on average; whole tiles cost what they can hold


def output_dims(weight: GroupedWeight) -> tuple[int, ...]:
    """The dims of an output of `weight`."""
    return weight.shape[2:] if isinstance(weight, jax.Array) else weight.dims


def reference(x: Float[Array, "M D"], group_sizes: Int[Array, " E"], weight: GroupedWeight) -> Float[Array, "M N"]:
    """The definition, in plain XLA; differentiable. Platforms without a grouped product multiply by every weight."""
    assert not isinstance(weight, PackedWeight), "packed weights are for native products only"
    matrices = weight.dequantize(x.dtype) if isinstance(weight, QuantizedWeight) else weight
    return jax.lax.ragged_dot(x, matrices.reshape(matrices.shape[0], x.shape[1], -1), group_sizes)


def grouped_matmul(
    x: Float[Array, "M D"], group_sizes: Int[Array, " E"], *weights: GroupedWeight
) -> tuple[Float[Array, "M _"], ...]:
    """x · w for each weight, every row with the matrix of its group.

    Args:
        x: activations, those of group 0 first, then those of group 1, and so on; float32 or bfloat16.
        group_sizes: rows of each group; they add up to M.
        weights: of D inputs each. Gradients flow through plain ones.

    Returns:
        One array for each weight, of x's dtype, with flat outputs.
    """
    results: list[jax.Array] = []
    for packing, alike in itertools.groupby(weights, lambda w: w.format if isinstance(w, PackedWeight) else None):
        if packing:
            packed = [w for w in alike if isinstance(w, PackedWeight)]
            results += native_products(x, packed, x.dtype, group_sizes)
        else:
            results += [_grouped(x, group_sizes, w) for w in alike]
    return tuple(results)


@jax.custom_vjp
def _grouped(x: jax.Array, group_sizes: jax.Array, weight: GroupedWeight) -> jax.Array:
    return _tiled(x, group_sizes, weight, _tile(x.shape[0], group_sizes.shape[0]))


def _forward(x: jax.Array, group_sizes: jax.Array, weight: GroupedWeight) -> tuple[jax.Array, tuple[object, ...]]:
    return _grouped(x, group_sizes, weight), (x, group_sizes, weight)


def _backward(saved: tuple[jax.Array, jax.Array, jax.Array], given: jax.Array) -> tuple[jax.Array, None, jax.Array]:
    x, group_sizes, weight = saved
    _, pull = jax.vjp(lambda x, weight: reference(x, group_sizes, weight), x, weight)
    to_x, to_weight = pull(given)
    return to_x, None, to_weight


_grouped.defvjp(_forward, _backward)


def _tile(rows: int, groups: int) -> int:
    """The rows of a tile, for so many rows in so many groups."""
    return max([TILES[0], *(B for B in TILES if B * groups <= rows)])


@functools.partial(jax.jit, static_argnums=3)  # traced once for all the layers that call it alike
def _tiled(x: jax.Array, group_sizes: jax.Array, weight: GroupedWeight, B: int) -> jax.Array:
    """Tile after tile. What a tile writes past its group, a tile of the next one overwrites."""
    M = x.shape[0]
    starts, ends = jnp.cumsum(group_sizes) - group_sizes, jnp.cumsum((group_sizes + B - 1) // B)
    padded = jnp.pad(x, ((0, B), (0, 0)))

    def multiply(i: int | jax.Array, out: jax.Array) -> jax.Array:
        e = jnp.searchsorted(ends, i, side="right")
        skipped = i - (ends[e] - (group_sizes[e] + B - 1) // B)
        row = starts[e] + skipped * B
        rows = jax.lax.dynamic_slice_in_dim(padded, row, B)
        return jax.lax.dynamic_update_slice_in_dim(out, _product(rows, _matrix(weight, e, x)), row, 0)

    out = jax.lax.fori_loop(0, ends[-1], multiply, jnp.zeros((M + B, math.prod(output_dims(weight))), x.dtype))
    return out[:M]


def _matrix(weight: GroupedWeight, e: jax.Array, x: jax.Array) -> Float[Array, "D N"]:
    """One group's weight as numbers."""
    one = jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, e, keepdims=False), weight)
    return one.dequantize(x.dtype) if isinstance(one, QuantizedWeight) else one.reshape(x.shape[1], -1)


def _product(rows: Float[Array, "B D"], matrix: Float[Array, "D N"]) -> Float[Array, "B N"]:
    """In float32 on a CPU, whose products of few rows in bfloat16 are many times slower than the conversion."""

    def in_float32(rows: jax.Array, matrix: jax.Array) -> jax.Array:
        return jnp.matmul(rows.astype(jnp.float32), matrix.astype(jnp.float32)).astype(rows.dtype)

    if rows.dtype == jnp.float32:
        return jnp.matmul(rows, matrix)
    return jax.lax.platform_dependent(rows, matrix, cpu=in_float32, default=jnp.matmul)
