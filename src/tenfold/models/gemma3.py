"""Gemma 3, text (Gemma Team, 2025): norms before and after each part and on q and k, five sliding layers to a full one.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H query heads, J key-value heads,
K head dim.

Sliding and full layers rotate with different bases. Of checkpoints with a vision tower the text part is read.
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
from tenfold.nn.attention import attention_params, head_norm_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import rotate
from tenfold.nn.mlp import gated_mlp, mlp_params
from tenfold.nn.multimodal import TOWERS, text_config, text_params
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers

DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Gemma 3 checkpoint; letters as in the module's legend."""

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
    scale: float
    final_softcap: float | None = None
    eps: float = 1e-6
    act: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    tied: bool = True

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf = {"head_dim": 256, **text_config(hf, DEFAULTS)}
        hf_config.refuse(hf, use_bidirectional_attention=False, attn_logit_softcapping=None)
        layers = hf_config.require(hf, "num_hidden_layers")
        types = hf_config.read_layer_types(hf, period=6, num_layers=layers)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size"),
            L=layers,
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            rope=hf_config.read_rope(hf, layer_type="full_attention", default_theta=1_000_000.0),
            sliding_rope=hf_config.read_sliding_rope(hf, theta_key="rope_local_base_freq", default_theta=10_000.0),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            windows=hf_config.read_windows(types, hf.get("sliding_window", 4096)),
            scale=float(hf.get("query_pre_attn_scalar", 256)) ** -0.5,
            final_softcap=hf.get("final_logit_softcapping"),
            eps=float(hf.get("rms_norm_eps", 1e-6)),
            act=hf_config.read_activation(hf, "hidden_activation", default="gelu_pytorch_tanh"),
            attention_bias=bool(hf.get("attention_bias", False)),
            tied=bool(hf.get("tie_word_embeddings", True)),
        )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: the window, and with it the rotation."""
    return tuple(
        AttentionSpec(scale=c.scale, window=window, rope="full" if window is None else "sliding")
        for window in c.windows
    )


def cache_specs(c: Config) -> tuple[CacheSpec, ...]:
    """The cache that each layer needs."""
    return tuple(KeyValueSpec(c.J, c.K, window) for window in c.windows)


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    declared = {
        **embedding_params(c.V, c.D, tied=c.tied),
        "layers": [_layer(c, f"model.layers.{i}") for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="zeros"),
    }
    return text_params(declared)


def skipped(c: Config) -> tuple[str, ...]:
    """Other modalities."""
    return TOWERS


def _layer(c: Config, at: str) -> dict[str, Param]:
    def norm(name: str) -> Param:
        return param((c.D,), "embed", f"{at}.{name}_layernorm.weight", init="zeros")

    return {
        "attn_norm": norm("input"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, qkv_bias=c.attention_bias, o_bias=c.attention_bias),
        **head_norm_params(f"{at}.self_attn", c.K, init="zeros"),
        "attn_post_norm": norm("post_attention"),
        "mlp_norm": norm("pre_feedforward"),
        **mlp_params(f"{at}.mlp", c.D, c.F),
        "mlp_post_norm": norm("post_feedforward"),
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

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return rms_norm(x, weight, c.eps, offset=1.0)

    def block(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = attention.qkv(norm(x, w["attn_norm"]), w)
        q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        cos_sin = angles[spec.rope or "full"]
        o, cache = attend(Heads(rotate(q, *cos_sin), rotate(k, *cos_sin), v), cache, spec)
        x = x + norm(attention.output(o, w), w["attn_post_norm"])
        return x + norm(gated_mlp(norm(x, w["mlp_norm"]), w, c.act), w["mlp_post_norm"]), cache

    # The factor is rounded to the weights' dtype, as in training.
    x = embed(p["embed"], tokens, p["norm"].dtype) * jnp.asarray(c.D**0.5, p["norm"].dtype)
    x, caches = run_layers(block, p["layers"], kinds(c), x, caches)
    return norm(x, p["norm"]), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states, soft-capped where the config says so."""
    return unembed(p, x, softcap=c.final_softcap)
