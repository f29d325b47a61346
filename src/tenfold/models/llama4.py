"""Llama 4 (Meta, 2025), the text part: chunked attention, unrotated layers that see everything, and top-1 experts.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width of dense layers, W of an expert, L layers,
H query heads, J key-value heads, K head dim, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.base.errors import ConfigError, UnsupportedModelError
from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.nn import attention, hf_config, moe, rope
from tenfold.nn.attention import attention_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import rotate
from tenfold.nn.mlp import mlp_params
from tenfold.nn.moe import Router
from tenfold.nn.multimodal import text_config
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers

INTERVAL = 4  # every so many layers is not rotated, unless `no_rope_layers` says otherwise


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Llama 4 checkpoint; letters as in the module's legend.

    Attributes:
        layers: the attention of each layer.
        mixtures: which layers have experts.
        qk_norm: whether rotated queries and keys are then normalised.
        temperature: (floor, scale) of what grows the scores of far positions in layers that are not rotated, or None.
        at: begins the names of the weights.
    """

    V: int
    D: int
    F: int
    W: int
    L: int
    H: int
    J: int
    K: int
    E: int
    router: Router
    layers: tuple[AttentionSpec, ...]
    mixtures: tuple[bool, ...]
    rope: Rope
    max_len: int
    eps: float = 1e-5
    attention_bias: bool = False
    qk_norm: bool = True
    temperature: tuple[float, float] | None = None
    tied: bool = False
    at: str = ""

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        at = "language_model." if hf.get("text_config") else ""
        hf = {"head_dim": 128, **text_config(hf)}
        hf_config.refuse(hf, hidden_act="silu")
        L, experts = (
            hf_config.require(hf, "num_hidden_layers"),
            hf_config.read_num_experts(hf, "num_local_experts", default=16),
        )
        step = hf.get("interleave_moe_layer_step", 1)
        mixtures = range(step - 1, L, step) if hf.get("moe_layers") is None else hf["moe_layers"]
        tuned = hf.get("attn_temperature_tuning", True)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size_mlp"),
            W=hf_config.require(hf, "intermediate_size"),
            L=L,
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            E=experts,
            router=Router(
                top_k=hf_config.read_top_k(hf, experts, default=1), score="sigmoid", renormalize=False, on_input=True
            ),
            layers=_read_layers(hf, L, hf_config.head_dim(hf)),
            mixtures=tuple(i in mixtures for i in range(L)),
            rope=hf_config.read_rope(hf, default_theta=500_000.0),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            eps=float(hf.get("rms_norm_eps", 1e-5)),
            attention_bias=bool(hf.get("attention_bias", False)),
            qk_norm=bool(hf.get("use_qk_norm", True)),
            temperature=(float(hf.get("floor_scale", 8192)), float(hf.get("attn_scale", 0.1))) if tuned else None,
            tied=bool(hf.get("tie_word_embeddings", False)),
            at=at,
        )


def _read_layers(hf: HFConfig, L: int, K: int) -> tuple[AttentionSpec, ...]:
    """Rotated layers see their own chunk, and others everything, unless `layer_types` says otherwise."""
    interval = hf.get("no_rope_layer_interval", INTERVAL)
    rotated = hf.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(L)]
    types = hf.get("layer_types") or ["chunked_attention" if turns else "full_attention" for turns in rotated]
    unknown = sorted(set(types) - {"chunked_attention", "full_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"config.json has layer types {unknown}; llama4 has chunked_attention, full_attention"
        )
    chunk = hf.get("attention_chunk_size", 8192)
    if len(types) != L or len(rotated) != L or ("chunked_attention" in types and not chunk):
        raise ConfigError(
            f"config.json has {len(types)} layer_types, {len(rotated)} no_rope_layers and attention_chunk_size={chunk} "
            f"for {L} layers"
        )
    return tuple(
        AttentionSpec(
            scale=K**-0.5,
            rope="default" if turns else None,
            chunk=chunk if kind == "chunked_attention" else None,
        )
        for kind, turns in zip(types, rotated, strict=True)
    )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: rotation, and how far they see."""
    return c.layers


def cache_specs(c: Config) -> tuple[CacheSpec, ...]:
    """The cache that each layer needs."""
    return tuple(KeyValueSpec(c.J, c.K, chunk=spec.chunk) for spec in c.layers)


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    return {
        **embedding_params(c.V, c.D, tied=c.tied, prefix=f"{c.at}model", head=f"{c.at}lm_head"),
        "layers": [_layer(c, f"{c.at}model.layers.{i}", c.mixtures[i]) for i in range(c.L)],
        "norm": param((c.D,), "embed", f"{c.at}model.norm.weight", init="ones"),
    }


def _layer(c: Config, at: str, mixture: bool) -> dict[str, Param]:
    bias = c.attention_bias
    return {
        "attn_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, qkv_bias=bias, o_bias=bias),
        "mlp_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="ones"),
        **(_experts(c, f"{at}.feed_forward") if mixture else mlp_params(f"{at}.feed_forward", c.D, c.F)),
    }


def _experts(c: Config, at: str) -> Tree:
    return {
        **moe.router_params(f"{at}.router", c.D, c.E),
        **moe.fused_expert_params(f"{at}.experts", c.D, c.W, c.E),
        "shared": mlp_params(f"{at}.shared_expert", c.D, c.W),
    }


def skipped(c: Config) -> tuple[str, ...]:
    """The tower that sees images, and what maps it to the text part's width."""
    return ("vision_model.*", "multi_modal_projector.*") if c.at else ()


def temperatures(c: Config, positions: Int[Array, " T"]) -> Float[Array, "T 1 1"]:
    """What multiplies the queries of unrotated layers: 1, and more beyond the first `floor` positions."""
    floor, scale = c.temperature or (1.0, 0.0)
    grown = jnp.log1p(jnp.floor((positions.astype(jnp.float32) + 1) / floor)) * scale + 1
    return grown[:, None, None]


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
    temperature = temperatures(c, positions)

    def block(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = attention.qkv(rms_norm(x, w["attn_norm"], c.eps), w)
        if spec.rope is not None:
            q, k = rotate(q, *cos_sin, interleaved=True), rotate(k, *cos_sin, interleaved=True)
        if spec.rope is not None and c.qk_norm:
            q, k = rms_norm(q, jnp.ones_like(q[0, 0]), c.eps), rms_norm(k, jnp.ones_like(k[0, 0]), c.eps)
        if spec.rope is None and c.temperature is not None:
            q = (q.astype(jnp.float32) * temperature).astype(q.dtype)
        o, cache = attend(Heads(q, k, v), cache, spec)
        x = x + attention.output(o, w)
        return x + moe.feed_forward(rms_norm(x, w["mlp_norm"], c.eps), w, c.router, "silu"), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return rms_norm(x, p["norm"], c.eps), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
