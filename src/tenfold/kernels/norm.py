"""Normalisation of activations.

Dims: B any leading dims, D model width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tenfold.kernels import native


def _kept_by_inputs(norm: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A norm whose gradient computes it again: keeping what it reads besides the inputs would take longer."""
    return jax.checkpoint(norm, prevent_cse=False)


def rms_reference(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, offset: float | None
) -> Float[Array, "*B D"]:
    """The definition, in plain XLA."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    w = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
    if offset is None:
        return x32.astype(x.dtype) * w
    return (x32 * (w.astype(jnp.float32) + offset)).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, offset: float | None = None
) -> Float[Array, "*B D"]:
    """Root-mean-square normalisation over the last dim (Zhang and Sennrich, 2019), in float32.

    Families round differently. Llama's rounds to the input's dtype and then multiplies by the weight. With `offset`,
    the multiplication by `weight + offset` comes before the rounding: 1 for Gemma, which stores its weights around
    zero, and 0 for OLMo.

    On a CPU a row's result does not depend on the rows beside it, to the last bit: XLA's sums over a row do.
    """
    if not native.suits(x, weight):
        return rms_reference(x, weight, eps, offset)
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=functools.partial(_native_rms_norm, eps=eps, offset=offset),
        default=functools.partial(rms_reference, eps=eps, offset=offset),
    )


@rms_norm.defjvp
def _differentiate_rms_norm(
    eps: float, offset: float | None, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(_kept_by_inputs(functools.partial(rms_reference, eps=eps, offset=offset)), primals, tangents)


def _native_rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, offset: float | None) -> jax.Array:
    call = jax.ffi.ffi_call("tenfold_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    return call(x, weight, eps=np.float32(eps), offset=np.float32(offset or 0), weight_last=offset is None)


def layer_reference(
    x: Float[Array, "*B D"], weight: Float[Array, "*N D"], bias: Float[Array, "*N D"], eps: float
) -> Float[Array, "*B D"]:
    """The definition, in plain XLA."""
    x32 = x.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    leading = tuple(range(x.ndim - weight.ndim))
    w, b = (jnp.expand_dims(part.astype(jnp.float32), leading) for part in (weight, bias))
    return (x32 * w + b).astype(x.dtype)


def layer_norm(
    x: Float[Array, "*B D"], weight: Float[Array, "*N D"], bias: Float[Array, "*N D"] | None, eps: float
) -> Float[Array, "*B D"]:
    """Layer normalisation over the last dim (Ba et al., 2016), in float32.

    The weight and the bias are for all rows alike, or differ by the dims before the last (one for each head). On a CPU
    a row's result does not depend on the rows beside it, as with `rms_norm`.
    """
    return _layer_norm(x, weight, jnp.zeros_like(weight) if bias is None else bias, eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    if not native.suits(x, weight):
        return layer_reference(x, weight, bias, eps)
    return jax.lax.platform_dependent(
        x,
        weight,
        bias,
        cpu=functools.partial(_native_layer_norm, eps=eps),
        default=functools.partial(layer_reference, eps=eps),
    )


@_layer_norm.defjvp
def _differentiate_layer_norm(
    eps: float, primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(_kept_by_inputs(functools.partial(layer_reference, eps=eps)), primals, tangents)


def _native_layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, *, eps: float) -> jax.Array:
    call = jax.ffi.ffi_call("tenfold_layer_norm", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    return call(x, weight, bias, eps=np.float32(eps))
