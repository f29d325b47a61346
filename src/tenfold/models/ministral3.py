"""Ministral 3 (Mistral AI, 2025): Mistral with yarn, and queries that grow with their position.

Of checkpoints with a vision tower the text part is read. That of Mistral Small 3.1 and 3.2 is Mistral, which has the
same layers.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H query heads, J key-value heads,
K head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.nn import attention, hf_config, rope
from tenfold.nn.attention import attention_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import rotate
from tenfold.nn.mlp import gated_mlp, mlp_params
from tenfold.nn.multimodal import TOWERS, text_config, text_params
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers

# What a config.json without any rotation means.
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Ministral 3 checkpoint; letters as in the module's legend."""

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    K: int
    rope: Rope
    max_len: int
    query_beta: float | None = None
    window: int | None = None
    eps: float = 1e-5
    act: str = "silu"
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf = text_config(hf)
        hf_config.refuse(hf, layer_types=None)
        rotates = any(hf.get(key) for key in ("rope_parameters", "rope_scaling", "rope_theta"))
        hf = {"head_dim": 128, **hf, **({} if rotates else {"rope_parameters": ROPE})}
        beta = (hf.get("rope_parameters") or hf.get("rope_scaling") or {}).get("llama_4_scaling_beta")
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size"),
            L=hf_config.require(hf, "num_hidden_layers"),
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            rope=hf_config.read_rope(hf),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            query_beta=None if beta is None else float(beta),
            window=hf.get("sliding_window"),
            eps=float(hf.get("rms_norm_eps", 1e-5)),
            act=hf_config.read_activation(hf),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: nothing."""
    return (AttentionSpec(scale=c.K**-0.5, window=c.window),) * c.L


def cache_specs(c: Config) -> tuple[CacheSpec, ...]:
    """The cache that each layer needs."""
    return (KeyValueSpec(c.J, c.K, c.window),) * c.L


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    declared = {
        **embedding_params(c.V, c.D, tied=c.tied),
        "layers": [_layer(c, f"model.layers.{i}") for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="ones"),
    }
    return text_params(declared)


def skipped(c: Config) -> tuple[str, ...]:
    """Other modalities."""
    return TOWERS


def _layer(c: Config, at: str) -> dict[str, Param]:
    return {
        "attn_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K),
        "mlp_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="ones"),
        **mlp_params(f"{at}.mlp", c.D, c.F),
    }


def forward(
    p: Tree,
    c: Config,
    tokens: Int[Array, " T"],
    positions: Int[Array, " T"],
    attend: Attend,
    caches: Sequence[Any] | None = None,
) -> tuple[Float[Array, "T D"], list[Any]]:
    """Hidden states of packed tokens, after the last norm, and the updated caches."""
    cos_sin = rope.cos_sin(c.rope, positions, c.max_len)

    def block(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = attention.qkv(rms_norm(x, w["attn_norm"], c.eps), w)
        q = rotate(q, *cos_sin)
        if c.query_beta is not None:
            q = q * _query_factors(c, positions)[:, None, None].astype(q.dtype)
        o, cache = attend(Heads(q, rotate(k, *cos_sin), v), cache, spec)
        x = x + attention.output(o, w)
        return x + gated_mlp(rms_norm(x, w["mlp_norm"], c.eps), w, c.act), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return rms_norm(x, p["norm"], c.eps), caches


def _query_factors(c: Config, positions: Int[Array, " T"]) -> Float[Array, " T"]:
    """1 within the original context, and the logarithm of how many of it lie behind a token beyond: scores would
    flatten as keys become many (Llama 4)."""
    return 1 + (c.query_beta or 0.0) * jnp.log1p((positions // c.rope.original_len).astype(jnp.float32))


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
