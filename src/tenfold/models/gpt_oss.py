"""gpt-oss (OpenAI, 2025): experts with clamped gates in every layer, attention sinks, and every other layer sliding.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width of an expert, L layers, H query heads,
J key-value heads, K head dim, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.nn import attention, hf_config, moe, rope
from tenfold.nn.attention import attention_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import rotate
from tenfold.nn.moe import Router
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one gpt-oss checkpoint; letters as in the module's legend.

    `alpha` and `limit` are those of `gate_and_clamp`.
    """

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
    windows: tuple[int | None, ...]
    eps: float = 1e-5
    attention_bias: bool = True
    alpha: float = 1.702
    limit: float = 7.0
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf_config.refuse(hf, hidden_act="silu")
        hf = {"head_dim": 64, **hf}
        if not hf.get("rope_parameters") and not hf.get("rope_scaling"):
            hf = {**hf, "rope_scaling": YARN}
        layers, experts = (
            hf_config.require(hf, "num_hidden_layers"),
            hf_config.read_num_experts(hf, "num_local_experts", default=128),
        )
        types = hf_config.read_layer_types(hf, period=2, num_layers=layers)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size"),
            L=layers,
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            E=experts,
            router=Router(top_k=hf_config.read_top_k(hf, experts, default=4)),
            rope=hf_config.read_rope(hf, default_theta=150_000.0),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            windows=hf_config.read_windows(types, hf.get("sliding_window", 128)),
            eps=float(hf.get("rms_norm_eps", 1e-5)),
            attention_bias=bool(hf.get("attention_bias", True)),
            alpha=float(hf.get("swiglu_alpha", 1.702)),
            limit=float(hf.get("swiglu_limit", 7.0)),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: the window."""
    return tuple(AttentionSpec(scale=c.K**-0.5, window=window) for window in c.windows)


def cache_specs(c: Config) -> tuple[CacheSpec, ...]:
    """The cache that each layer needs."""
    return tuple(KeyValueSpec(c.J, c.K, window) for window in c.windows)


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    return {
        **embedding_params(c.V, c.D, tied=c.tied),
        "layers": [_layer(c, f"model.layers.{i}") for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="ones"),
    }


def _layer(c: Config, at: str) -> dict[str, Param]:
    bias = c.attention_bias
    return {
        "attn_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, qkv_bias=bias, o_bias=bias),
        "sinks": param((c.H,), "heads", f"{at}.self_attn.sinks"),
        "mlp_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="ones"),
        **moe.router_params(f"{at}.mlp.router", c.D, c.E, bias=True),
        **moe.fused_expert_params(f"{at}.mlp.experts", c.D, c.F, c.E, interleaved=True, bias=True),
    }


def gate_and_clamp(gate: jax.Array, up: jax.Array, c: Config) -> jax.Array:
    """A SwiGLU whose sigmoid is `alpha` times as steep, of values within `limit`, and with 1 added to what it gates."""
    gate, up = jnp.minimum(gate, c.limit), jnp.clip(up, -c.limit, c.limit)
    return gate * jax.nn.sigmoid(c.alpha * gate) * (up + 1)


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
        q, k, v = attention.qkv(rms_norm(x, w["attn_norm"], c.eps, offset=0.0), w)
        o, cache = attend(Heads(rotate(q, *cos_sin), rotate(k, *cos_sin), v, w["sinks"]), cache, spec)
        x = x + attention.output(o, w)
        experts = moe.mixture(rms_norm(x, w["mlp_norm"], c.eps, offset=0.0), w, c.router, partial(gate_and_clamp, c=c))
        return x + experts, cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return rms_norm(x, p["norm"], c.eps, offset=0.0), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
