"""Normalisation of activations.

Dims: B any leading dims, D model width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tenfold.kernels import native

NATIVE_DTYPES = ("float32", "bfloat16")


def reference(
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
    if x.dtype != weight.dtype or x.dtype.name not in NATIVE_DTYPES or native.library() is None:
        return reference(x, weight, eps, offset)
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=functools.partial(_native, eps=eps, offset=offset),
        default=functools.partial(reference, eps=eps, offset=offset),
    )


@rms_norm.defjvp
def _differentiate(
    eps: float, offset: float | None, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(functools.partial(reference, eps=eps, offset=offset), primals, tangents)


def _native(x: jax.Array, weight: jax.Array, *, eps: float, offset: float | None) -> jax.Array:
    call = jax.ffi.ffi_call("tenfold_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential")
    return call(x, weight, eps=np.float32(eps), offset=np.float32(offset or 0), weight_last=offset is None)
