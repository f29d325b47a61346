"""The vocabulary at both ends of a decoder: tokens to activations, and activations to logits.

Dims: T packed tokens, S rows, V vocabulary, D model width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tenfold.kernels.matmul import Weight, lookup, matmul
from tenfold.kernels.product import product
from tenfold.nn.param import Param, param


def embedding_params(V: int, D: int, *, tied: bool, prefix: str = "model", head: str = "lm_head") -> dict[str, Param]:
    """Declares the embedding and, unless it is tied to it, the head that gives logits; `prefix` of the former."""
    name, head = f"{prefix}.embed_tokens.weight", f"{head}.weight"
    if tied:
        return {"embed": param((V, D), "vocab embed", name, aliases=(head,), inputs="embed")}
    return {
        "embed": param((V, D), "vocab embed", name),
        "head": param((D, V), "embed vocab", head, "V D -> D V", inputs="embed"),
    }


def embed(weight: Weight, tokens: Int[Array, " T"], dtype: DTypeLike) -> Float[Array, "T D"]:
    """The activations that tokens start as."""
    return lookup(weight, tokens, dtype)


def unembed(p: Mapping[str, Any], x: Float[Array, "S D"], *, softcap: float | None = None) -> Float[Array, "S V"]:
    """Float32 logits by the head, or by the embedding where they are tied; soft-capped to ±`softcap` (Gemma 2)."""
    head: Weight = p["head"] if "head" in p else p["embed"]
    if "head" not in p and isinstance(head, jax.Array):
        logits = product(x, head, jnp.float32, transposed=True)
    else:
        (logits,) = matmul(x, head, dtype=jnp.float32)
    return softcap * jnp.tanh(logits / softcap) if softcap else logits
