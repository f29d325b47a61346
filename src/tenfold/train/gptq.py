"""GPTQ (Frantar et al., 2022): rounding a weight input by input, each error made up for by the inputs to come.

What is made small is ‖X·W - X·Q‖², the error of the products with the activations X that calibration saw.

Dims: M rows of activations, D inputs, N outputs, G groups of inputs that share a scale, P inputs with padding.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, UInt8

from tenfold.base.errors import CheckpointError
from tenfold.kernels.matmul import QuantizedWeight
from tenfold.nn.quantization import pack_codes, quantize

BLOCK = 128  # inputs whose errors reach the later ones in one product
DAMPING = (0.01, 0.1, 1.0)  # of the mean second moment, added to all; more where the factorisation needs it


def gptq(
    matrix: Float[Array, "D N"],
    moments: Float32[Array, "D D"],
    bits: int,
    group: int | None,
    dims: tuple[int, ...] | None = None,
    *,
    scale_dtype: DTypeLike = jnp.float32,
) -> QuantizedWeight:
    """Rounds a weight to the grid that `quantize` gives it, with the errors spread over the inputs.

    Inputs are rounded in the order of their second moments, the largest first; their groups stay those of neighbours.

    Args:
        matrix: the weights.
        moments: Xᵀ·X.
        bits, group, dims: as in `quantize`.
        scale_dtype: that the scales are stored in, and so rounded to before anything else.

    Raises:
        CheckpointError: if the moments are not finite.
    """
    start = quantize(matrix, bits, group, dims)
    scales = start.scales.astype(scale_dtype).astype(jnp.float32)
    order = jnp.argsort(-jnp.diagonal(moments))
    for damping in DAMPING:
        factor = _inverse_factor(moments[order][:, order], damping)
        if jnp.isfinite(factor).all():
            codes = _round_in_order(matrix, scales, order, factor, start.bits)
            return replace(start, codes=pack_codes(codes, start.bits), scales=scales)
    raise CheckpointError("the model's activations on the calibration text are not finite; its weights may be damaged")


@jax.jit
def _inverse_factor(moments: Float32[Array, "D D"], damping: float | jax.Array) -> Float32[Array, "D D"]:
    """U with Uᵀ·U = (H + damping)⁻¹: its row i has what input i's error means for those after it."""
    mean = jnp.diagonal(moments).mean()
    eye = jnp.eye(len(moments), dtype=jnp.float32)
    damped = moments + eye * jnp.where(mean > 0, damping * mean, 1.0)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(damped), True), eye)
    return jnp.linalg.cholesky(inverse).T


@functools.partial(jax.jit, static_argnames="bits")
def _round_in_order(
    matrix: Float[Array, "D N"],
    scales: Float32[Array, "G N"],
    order: Int[Array, " D"],
    factor: Float32[Array, "D D"],
    bits: int,
) -> UInt8[Array, "D N"]:
    D, N = matrix.shape
    block = min(BLOCK, D)
    padding = -D % block
    middle, largest = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    groups = jnp.pad(order // (D // len(scales)), (0, padding))
    P = jnp.arange(D + padding)
    factor = jnp.pad(factor, ((0, padding), (0, padding))) + jnp.diag((P >= D).astype(jnp.float32))
    weights = jnp.pad(matrix[order].astype(jnp.float32), ((0, padding), (0, 0)))

    def round_block(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weights, codes = state
        first = b * block
        rows = jax.lax.dynamic_slice_in_dim(factor, first, block)
        square = jax.lax.dynamic_slice_in_dim(rows, first, block, axis=1)

        def round_input(
            i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            part, errors, codes = state
            scale = scales[groups[first + i]]
            code = jnp.clip(jnp.round(part[i] / jnp.where(scale > 0, scale, 1)), -largest, largest)
            error = (part[i] - code * scale) / square[i, i]
            part -= square[i][:, None] * error[None]
            return part, errors.at[i].set(error), codes.at[first + i].set((code + middle).astype(jnp.uint8))

        part = jax.lax.dynamic_slice_in_dim(weights, first, block)
        _, errors, codes = jax.lax.fori_loop(0, block, round_input, (part, jnp.zeros_like(part), codes))
        later = jnp.where(P[None] >= first + block, rows, 0)
        return weights - jnp.matmul(later.T, errors, precision="highest"), codes

    start = weights, jnp.zeros(weights.shape, jnp.uint8)
    _, codes = jax.lax.fori_loop(0, len(P) // block, round_block, start)
    return jnp.zeros((D, N), jnp.uint8).at[order].set(codes[:D])
