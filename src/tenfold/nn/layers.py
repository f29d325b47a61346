"""The layers that dense decoders are made of, as plain functions over arrays.

Dims: T packed tokens, D model width, F feed-forward width, H heads, K head dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tenfold.base.errors import UnsupportedModelError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation that a Hugging Face config calls `name`. Raises UnsupportedModelError for any other."""
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"the activation {name!r} is not implemented; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, *, offset: float | None = None
) -> Float[Array, "*B D"]:
    """Root-mean-square normalisation over the last dim (Zhang and Sennrich, 2019), in float32.

    Families round differently. Llama's rounds to the input's dtype and then multiplies by the weight. With `offset`,
    the multiplication by `weight + offset` comes before the rounding: 1 for Gemma, which stores its weights around
    zero, and 0 for OLMo.
    """
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    w = jnp.expand_dims(weight, tuple(range(x.ndim - 1)))
    if offset is None:
        return x32.astype(x.dtype) * w
    return (x32 * (w.astype(jnp.float32) + offset)).astype(x.dtype)


def project(x: Float[Array, "T D"], w: Float[Array, " D *O"], bias: Float[Array, "*O"] | None = None) -> jax.Array:
    """A linear map of the last dim to one or several output dims: (T, D) · (D, O...) → (T, O...).

    Products are two-dimensional, which is the one shape that every backend has a fast path for.
    """
    y = x @ w.reshape(w.shape[0], -1)
    if bias is not None:
        y = y + bias.reshape(1, -1)
    return y.reshape(x.shape[0], *w.shape[1:])


def rotate(x: Float[Array, "T H K"], cos: Float[Array, "T half"], sin: Float[Array, "T half"]) -> Float[Array, "T H K"]:
    """Rotary position embedding (Su et al., 2021) of the first 2·half dims, in the half-split layout of Hugging Face.

    It is computed in float32: rounded to bfloat16, the sines of far positions would have two correct digits.
    """
    half = cos.shape[-1]
    x1, x2 = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half : 2 * half]))
    c, s = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate([x1 * c - x2 * s, x2 * c + x1 * s], axis=-1).astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)


def unembed(x: Float[Array, "S D"], head: Float[Array, "D V"], *, softcap: float | None = None) -> jax.Array:
    """Float32 logits [S, V], soft-capped to ±`softcap` where the model says so (Gemma 2)."""
    logits = jnp.matmul(x, head, preferred_element_type=jnp.float32)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits
