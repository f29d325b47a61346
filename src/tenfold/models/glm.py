"""GLM-4 (GLM Team, 2024): rotates half of each head, neighbours together; GLM-4-0414 adds a norm after each part.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H query heads, J key-value heads,
K head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
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
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one GLM-4 checkpoint; letters as in the module's legend."""

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    K: int
    rope: Rope
    max_len: int
    sandwich: bool
    eps: float = 1.5625e-7
    act: str = "silu"
    qkv_bias: bool = True
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf_config.refuse(hf, mlp_bias=False)
        hf = {"head_dim": 128, "partial_rotary_factor": 0.5, **hf}
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
            sandwich=hf.get("model_type") == "glm4",
            eps=float(hf.get("rms_norm_eps", 1.5625e-7)),
            act=hf_config.read_activation(hf),
            qkv_bias=bool(hf.get("attention_bias", True)),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: nothing."""
    return (AttentionSpec(scale=c.K**-0.5),) * c.L


def cache_specs(c: Config) -> tuple[CacheSpec, ...]:
    """The cache that each layer needs."""
    return (KeyValueSpec(c.J, c.K),) * c.L


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    return {
        **embedding_params(c.V, c.D, tied=c.tied),
        "layers": [_layer(c, f"model.layers.{i}") for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="ones"),
    }


def _layer(c: Config, at: str) -> dict[str, Param]:
    def norm(name: str) -> Param:
        return param((c.D,), "embed", f"{at}.{name}_layernorm.weight", init="ones")

    declared = {
        "attn_norm": norm("input"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, qkv_bias=c.qkv_bias),
        "mlp_norm": norm("post_attention"),
        **mlp_params(f"{at}.mlp", c.D, c.F, fused=True),
    }
    if c.sandwich:
        declared |= {"attn_post_norm": norm("post_self_attn"), "mlp_post_norm": norm("post_mlp")}
    return declared


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

    def norm(x: jax.Array, weight: jax.Array | None) -> jax.Array:
        return x if weight is None else rms_norm(x, weight, c.eps)

    def block(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = attention.qkv(norm(x, w["attn_norm"]), w)
        q, k = rotate(q, *cos_sin, interleaved=True), rotate(k, *cos_sin, interleaved=True)
        o, cache = attend(Heads(q, k, v), cache, spec)
        x = x + norm(attention.output(o, w), w.get("attn_post_norm"))
        return x + norm(gated_mlp(norm(x, w["mlp_norm"]), w, c.act), w.get("mlp_post_norm")), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return norm(x, p["norm"]), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
