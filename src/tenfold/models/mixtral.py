"""Mixtral (Jiang et al., 2024): Mistral with a mixture of experts in every layer.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width of an expert, L layers, H query heads,
J key-value heads, K head dim, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.nn import attention, hf_config, moe, rope
from tenfold.nn.attention import attention_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import gated, rotate
from tenfold.nn.moe import Router
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Mixtral checkpoint; letters as in the module's legend."""

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    K: int
    E: int
    router: Router
    rope: Rope
    max_len: int
    window: int | None = None
    eps: float = 1e-5
    act: str = "silu"
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf_config.refuse(hf, layer_types=None, attention_bias=False, mlp_bias=False)
        experts = hf_config.read_num_experts(hf, "num_local_experts", default=8)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size"),
            L=hf_config.require(hf, "num_hidden_layers"),
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            E=experts,
            router=Router(top_k=hf_config.read_top_k(hf, experts, default=2)),
            rope=hf_config.read_rope(hf, default_theta=1e6),
            max_len=hf_config.require(hf, "max_position_embeddings"),
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
    return {
        **embedding_params(c.V, c.D, tied=c.tied),
        "layers": [_layer(c, f"model.layers.{i}") for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="ones"),
    }


def _layer(c: Config, at: str) -> dict[str, Param]:
    return {
        "attn_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K),
        "mlp_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="ones"),
        **moe.router_params(f"{at}.block_sparse_moe.gate", c.D, c.E),
        **moe.expert_params(f"{at}.block_sparse_moe.experts", c.D, c.F, c.E, names=("w1", "w3", "w2")),
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
        o, cache = attend(Heads(rotate(q, *cos_sin), rotate(k, *cos_sin), v), cache, spec)
        x = x + attention.output(o, w)
        return x + moe.mixture(rms_norm(x, w["mlp_norm"], c.eps), w, c.router, gated(c.act)), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return rms_norm(x, p["norm"], c.eps), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
