"""GLM 4.5 to 4.7 (GLM team, 2025): a mixture of experts after some dense layers, routed as in DeepSeek-V3.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width of dense layers, W of an expert, L layers,
H query heads, J key-value heads, K head dim, E experts, S experts that every token has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.nn import attention, hf_config, moe, rope
from tenfold.nn.attention import attention_params, head_norm_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import rotate
from tenfold.nn.mlp import mlp_params
from tenfold.nn.moe import Router
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one GLM 4 MoE checkpoint; letters as in the module's legend. `dense` layers come first."""

    V: int
    D: int
    F: int
    W: int
    L: int
    H: int
    J: int
    K: int
    E: int
    S: int
    router: Router
    dense: int
    rope: Rope
    max_len: int
    eps: float = 1e-5
    act: str = "silu"
    attention_bias: bool = False
    qk_norm: bool = False
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf = {"partial_rotary_factor": 0.5, **hf}
        experts = hf_config.read_num_experts(hf, "n_routed_experts", default=128)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size"),
            W=hf_config.require(hf, "moe_intermediate_size"),
            L=hf_config.require(hf, "num_hidden_layers"),
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            E=experts,
            S=hf.get("n_shared_experts", 1),
            router=Router(
                top_k=hf_config.read_top_k(hf, experts, default=8),
                score="sigmoid",
                renormalize=bool(hf.get("norm_topk_prob", True)),
                scale=float(hf.get("routed_scaling_factor", 1.0)),
                groups=hf.get("n_group", 1),
                top_groups=hf.get("topk_group", 1),
            ),
            dense=hf.get("first_k_dense_replace", 1),
            rope=hf_config.read_rope(hf),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            eps=float(hf.get("rms_norm_eps", 1e-5)),
            act=hf_config.read_activation(hf),
            attention_bias=bool(hf.get("attention_bias", False)),
            qk_norm=bool(hf.get("use_qk_norm", False)),
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
        "layers": [_layer(c, f"model.layers.{i}", mixture=i >= c.dense) for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="ones"),
    }


def _layer(c: Config, at: str, *, mixture: bool) -> dict[str, Param]:
    return {
        "attn_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, qkv_bias=c.attention_bias),
        **(head_norm_params(f"{at}.self_attn", c.K) if c.qk_norm else {}),
        "mlp_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="ones"),
        **(_experts(c, f"{at}.mlp") if mixture else mlp_params(f"{at}.mlp", c.D, c.F)),
    }


def _experts(c: Config, at: str) -> Tree:
    return {
        **moe.router_params(f"{at}.gate", c.D, c.E, choice_bias=f"{at}.gate.e_score_correction_bias"),
        **moe.expert_params(f"{at}.experts", c.D, c.W, c.E),
        "shared": mlp_params(f"{at}.shared_experts", c.D, c.S * c.W),
    }


def skipped(c: Config) -> tuple[str, ...]:
    """Layers after the last, which predict tokens further ahead."""
    return (f"model.layers.{c.L}.*",)


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
        if c.qk_norm:
            q, k = rms_norm(q, w["q_norm"], c.eps), rms_norm(k, w["k_norm"], c.eps)
        o, cache = attend(Heads(rotate(q, *cos_sin), rotate(k, *cos_sin), v), cache, spec)
        x = x + attention.output(o, w)
        return x + moe.feed_forward(rms_norm(x, w["mlp_norm"], c.eps), w, c.router, c.act), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return rms_norm(x, p["norm"], c.eps), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
