"""The layers that dense decoders are made of, as plain functions over arrays.

Dims: T packed tokens, D model width, F feed-forward width, H heads, K head dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tenfold.base.errors import UnsupportedModelError
from tenfold.kernels.gate import FUNCTIONS as GATES
from tenfold.kernels.gate import gated as gate_by
from tenfold.kernels.matmul import Weight, matmul, output_dims
from tenfold.nn.param import Param, param

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The activation that a Hugging Face config calls `name`. Raises UnsupportedModelError for any other."""
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(f"the activation {name!r} is not implemented; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gated(act: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """act(gate) ⊙ up, for the name of an activation."""
    apply = activation(act)
    return lambda gate, up: gate_by(gate, up, act) if act in GATES else apply(gate) * up


def layer_norm_params(name: str, at: str, D: int) -> dict[str, Param]:
    """Declares the weight and the bias of a layer norm, the bias as `{name}_bias`."""
    return {
        name: param((D,), "embed", f"{at}.weight", init="ones"),
        f"{name}_bias": param((D,), "embed", f"{at}.bias", init="zeros"),
    }


def project(x: Float[Array, "T D"], w: Weight, bias: Float[Array, "*O"] | None = None) -> jax.Array:
    """A linear map of the last dim to one or several output dims: (T, D) · (D, O...) → (T, O...)."""
    return project_all(x, (w, bias))[0]


def project_all(x: Float[Array, "T D"], *maps: tuple[Weight, jax.Array | None]) -> tuple[jax.Array, ...]:
    """Several linear maps, each a weight and perhaps a bias, of the same activations."""
    products = matmul(x, *(w for w, _ in maps))
    return tuple(
        (y if bias is None else y + bias.reshape(1, -1)).reshape(x.shape[0], *output_dims(w, x.shape[1]))
        for y, (w, bias) in zip(products, maps, strict=True)
    )


def times(x: Float[Array, "*B D"], factor: float) -> Float[Array, "*B D"]:
    """The product with a factor that is not rounded to the activations' dtype."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def rotate(
    x: Float[Array, "T H K"], cos: Float[Array, "T half"], sin: Float[Array, "T half"], *, interleaved: bool = False
) -> Float[Array, "T H K"]:
    """Rotary position embedding (Su et al., 2021) of the first 2·half dims.

    A pair is a dim and the one `half` further, in the layout that Hugging Face gives most families; or, `interleaved`,
    two neighbours. It is computed in float32: rounded to bfloat16, the sines of far positions would have two correct
    digits.
    """
    half = cos.shape[-1]
    turned = x[..., : 2 * half].astype(jnp.float32)
    if interleaved:
        x1, x2 = turned[..., ::2], turned[..., 1::2]
    else:
        x1, x2 = turned[..., :half], turned[..., half:]
    c, s = cos[:, None, :], sin[:, None, :]
    pair = (x1 * c - x2 * s, x2 * c + x1 * s)
    rotated = jnp.stack(pair, axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    rotated = rotated.astype(x.dtype)
    return rotated if 2 * half == x.shape[-1] else jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)
