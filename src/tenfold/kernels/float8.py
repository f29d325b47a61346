"""Products in 8-bit floats, for training: operands are rounded, sums and results are not.

Activations and weights are rounded to e4m3, which has more bits after the point, and gradients to e5m2, which has more
range (Micikevicius et al., 2022, "FP8 Formats for Deep Learning"). Each array is first divided by a scale of its own,
so that its largest number now becomes the format's largest or little less: current scaling per tensor, as
TransformerEngine and torchao name it. It needs no memory of earlier steps, and in a program that is spread over devices
the largest number is that of all of them, so that the results do not depend on the mesh.

Scales are powers of two, as for some activations of DeepSeek-V3 (2024, section 3.3.2). So dividing by them is exact,
and a product may be rounded to bfloat16 before it is scaled. Floats are as precise at any scale: what is lost is one
power of two, at most, of the range.

A product is one `dot_general` of 8-bit operands whose result is scaled, what TransformerEngine's own fallback in JAX
gives to XLA. XLA makes cuBLASLt's 8-bit product of it and puts the scale into that (`GemmRewriter` in
xla/service/gpu/transforms/gemm_rewriter.cc), and where it does not, or a device has no 8-bit units, a product of wider
floats, which hold all of these exactly. On NVIDIA's GPUs the precision chooses how sums are kept: gradients ask for
the exact way, as in TransformerEngine, torchao and Flax.

Dims: M rows of activations, D inputs, N outputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)

_TOP = {E4M3: 8, E5M2: 15}  # the largest number of a format is 1.75 · 2^top
_QUARTER = 1 << 21  # of the mantissa of a float32


class Rounded(NamedTuple):
    """An array in 8 bits: codes · scale.

    Attributes:
        codes: e4m3 or e5m2.
        scale: a power of two; no number, if one of the array's is infinite or none.
    """

    codes: Float[Array, "A B"]
    scale: Float32[Array, ""]


def round_to(dtype: jnp.dtype, x: Float[Array, "A B"]) -> Rounded:
    """The nearest numbers in one of the formats, ties to even, under the least scale with which none is too large.

    An infinite number, or none, is seen in every product with the array.
    """
    largest = jnp.abs(x).max().astype(jnp.float32)
    # Its exponent, or the next if its mantissa is above 1.75: read off the bits, because log2 and exp2 are not exact.
    exponent = (jax.lax.bitcast_convert_type(largest, jnp.int32) + (_QUARTER - 1) >> 23) - 127
    power = jnp.maximum(exponent - _TOP[dtype], -126)
    scale = jnp.where(jnp.isfinite(largest), _power_of_two(power), jnp.nan)
    return Rounded((x.astype(jnp.float32) * _power_of_two(-power)).astype(dtype), scale)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(exponent + 127 << 23, jnp.float32)


def products(
    x: Float[Array, "M D"], *weights: Float[Array, "D _"], dtype: DTypeLike
) -> tuple[Float[Array, "M _"], ...]:
    """x · w for each weight, with operands in e4m3. Of gradients, those of results are rounded, once, to e5m2.

    Only once differentiable, and in reverse. The activations are kept for the gradient in 8 bits; weights, which are
    there anyway, are rounded again.

    Args:
        x: activations, float32 or bfloat16.
        weights: of D inputs each.
        dtype: of the results, float32 or bfloat16.
    """
    return _products(x, weights, jnp.dtype(dtype), x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _products(x: jax.Array, weights: tuple[jax.Array, ...], dtype: jnp.dtype, of_x: jnp.dtype) -> Any:
    return _forward(x, weights, dtype, of_x)[0]


def _forward(x: jax.Array, weights: tuple[jax.Array, ...], dtype: jnp.dtype, of_x: jnp.dtype) -> tuple[Any, Any]:
    del of_x
    rounded, fast = round_to(E4M3, x), jax.lax.Precision.DEFAULT
    return tuple(_dot(rounded, round_to(E4M3, w), (1, 0), dtype, fast) for w in weights), (rounded, weights)


def _backward(dtype: jnp.dtype, of_x: jnp.dtype, kept: Any, to_ys: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
    del dtype
    (x, weights), exact = kept, jax.lax.Precision.HIGHEST
    rounded = [round_to(E5M2, to_y) for to_y in to_ys]
    pairs = list(zip(weights, rounded, strict=True))
    parts = [_dot(to_y, round_to(E4M3, w), (1, 1), of_x, exact) for w, to_y in pairs]
    return functools.reduce(jnp.add, parts), tuple(_dot(x, to_y, (0, 0), w.dtype, exact) for w, to_y in pairs)


_products.defvjp(_forward, _backward)


def _dot(
    a: Rounded, b: Rounded, dims: tuple[int, int], dtype: jnp.dtype, precision: jax.lax.Precision
) -> Float[Array, "_ _"]:
    """The product over one dim of each."""
    contracted = ((dims[:1], dims[1:]), ((), ()))
    sums = jax.lax.dot_general(a.codes, b.codes, contracted, precision=precision, preferred_element_type=dtype)
    return sums * (a.scale * b.scale).astype(dtype)


def has_units(device: Any) -> bool:
    """Whether a `jax.Device` has units for products in these formats: NVIDIA's GPUs have since Ada (compute capability
    8.9), AMD's since MI350 (the formats of MI300 are others), and TPUs since version 7."""
    if device.platform == "tpu":
        return device.device_kind.startswith(("TPU7", "TPU8"))
    if device.platform != "gpu":
        return False
    capability = str(device.compute_capability)
    if capability.startswith("gfx"):
        return capability.startswith(("gfx950", "gfx12"))
    return tuple(map(int, capability.split("."))) >= (8, 9)
