"""OLMo 3 (Ettinger et al., 2025): OLMo 2 with sliding windows in three layers of four, whose rotation is never scaled.

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
from tenfold.nn.attention import attention_params, flat_norm, flat_norm_params
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
    """The architecture of one OLMo 3 checkpoint; letters as in the module's legend."""

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    K: int
    rope: Rope
    sliding_rope: Rope
    max_len: int
    windows: tuple[int | None, ...]
    eps: float = 1e-5
    act: str = "silu"
    attention_bias: bool = False
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        layers = hf_config.require(hf, "num_hidden_layers")
        types = hf_config.read_layer_types(hf, period=4, num_layers=layers)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size"),
            L=layers,
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            rope=hf_config.read_rope(hf, layer_type="full_attention", default_theta=500_000.0),
            sliding_rope=hf_config.read_sliding_rope(hf, theta_key="rope_theta", default_theta=500_000.0),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            windows=hf_config.read_windows(types, hf.get("sliding_window", 4096)),
            eps=float(hf.get("rms_norm_eps", 1e-5)),
            act=hf_config.read_activation(hf),
            attention_bias=bool(hf.get("attention_bias", False)),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: the window, and with it the rotation."""
    return tuple(
        AttentionSpec(scale=c.K**-0.5, window=window, rope="full" if window is None else "sliding")
        for window in c.windows
    )


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
    return {
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, qkv_bias=c.attention_bias, o_bias=c.attention_bias),
        **flat_norm_params(f"{at}.self_attn", c.H, c.J, c.K),
        "attn_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="ones"),
        **mlp_params(f"{at}.mlp", c.D, c.F),
        "mlp_norm": param((c.D,), "embed", f"{at}.post_feedforward_layernorm.weight", init="ones"),
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
    ropes = {"full": c.rope, "sliding": c.sliding_rope}
    angles = {name: rope.cos_sin(ropes[name], positions, c.max_len) for name in ropes}

    def block(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = attention.qkv(x, w)
        q, k = flat_norm(q, w["q_norm"], c.eps), flat_norm(k, w["k_norm"], c.eps)
        cos_sin = angles[spec.rope or "full"]
        o, cache = attend(Heads(rotate(q, *cos_sin), rotate(k, *cos_sin), v), cache, spec)
        x = x + rms_norm(attention.output(o, w), w["attn_norm"], c.eps, offset=0.0)
        return x + rms_norm(gated_mlp(x, w, c.act), w["mlp_norm"], c.eps, offset=0.0), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return rms_norm(x, p["norm"], c.eps, offset=0.0), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
