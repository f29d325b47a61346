"""Command R and R7B (Cohere, 2024): attention and feed-forward side by side after one norm.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H query heads, J key-value heads,
K head dim.

Command R rotates in every layer, and its largest size normalises q and k. Command R7B and Command A (Cohere 2)
rotate in sliding layers only; every fourth sees everything and rotates nothing (NoPE).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import layer_norm
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
    """The architecture of one Cohere checkpoint; letters as in the module's legend."""

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    K: int
    rope: Rope
    max_len: int
    windows: tuple[int | None, ...]
    rotated: tuple[bool, ...]
    logit_scale: float = 0.0625
    eps: float = 1e-5
    act: str = "silu"
    attention_bias: bool = False
    qk_norm: bool = False
    tied: bool = True

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf_config.refuse(hf, use_parallel_block=True, use_gated_activation=True, rotary_pct=1.0)
        layers = hf_config.require(hf, "num_hidden_layers")
        if hf.get("model_type") == "cohere":
            rope_theta, qk_norm = 500_000.0, bool(hf.get("use_qk_norm", False))
            types = ("full_attention",) * layers
            rotated = (True,) * layers
        else:
            hf_config.refuse(hf, use_qk_norm=False)
            rope_theta, qk_norm = 10_000.0, False
            types = hf_config.read_layer_types(hf, period=4, num_layers=layers)
            rotated = tuple(kind == "sliding_attention" for kind in types)
        scale = hf.get("logit_scale", 0.0625)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size"),
            L=layers,
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            rope=hf_config.read_rope(hf, default_theta=rope_theta),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            windows=hf_config.read_windows(types, hf.get("sliding_window", 4096)),
            rotated=rotated,
            logit_scale=1.0 if scale is None else float(scale),
            eps=float(hf.get("layer_norm_eps", 1e-5)),
            act=hf_config.read_activation(hf),
            attention_bias=bool(hf.get("attention_bias", False)),
            qk_norm=qk_norm,
            tied=bool(hf.get("tie_word_embeddings", True)),
        )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: the window, and whether they rotate."""
    return tuple(
        AttentionSpec(scale=c.K**-0.5, window=window, rope="default" if rotated else None)
        for window, rotated in zip(c.windows, c.rotated, strict=True)
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
    declared = {
        "norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, qkv_bias=c.attention_bias, o_bias=c.attention_bias),
        **mlp_params(f"{at}.mlp", c.D, c.F),
    }
    if c.qk_norm:  # a weight for every head
        declared["q_norm"] = param((c.H, c.K), "heads head_dim", f"{at}.self_attn.q_norm.weight", init="ones")
        declared["k_norm"] = param((c.J, c.K), "kv_heads head_dim", f"{at}.self_attn.k_norm.weight", init="ones")
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

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return layer_norm(x, weight, None, c.eps)

    def block(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        normed = norm(x, w["norm"])
        q, k, v = attention.qkv(normed, w)
        if c.qk_norm:
            q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        if spec.rope is not None:
            q, k = rotate(q, *cos_sin, interleaved=True), rotate(k, *cos_sin, interleaved=True)
        o, cache = attend(Heads(q, k, v), cache, spec)
        return x + attention.output(o, w) + gated_mlp(normed, w, c.act), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return norm(x, p["norm"]), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states, times the config's factor."""
    return unembed(p, x) * c.logit_scale
