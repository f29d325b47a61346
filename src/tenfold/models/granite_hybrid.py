"""Granite 4 (IBM, 2025): mostly Mamba 2, some attention without rotation, and a mixture of experts, or none.

Dims: T packed tokens, V vocabulary, D width, F width of the shared feed-forward, L layers, H query heads, J key-value
heads, K head dim, E experts (0 for a model without), W width of an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.kernels.recurrence import RecurrenceSpec
from tenfold.nn import attention, hf_config, moe, rope
from tenfold.nn.attention import attention_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import rotate
from tenfold.nn.mamba import MambaSizes, mamba, mamba_params
from tenfold.nn.moe import Router
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Granite 4 checkpoint; letters as in the module's legend.

    Attributes:
        rope: None where attention rotates nothing.
        recurrent: which layers do not attend.
        scale: of attention scores.
        by_embedding, by_residual, by_logits: what embeddings, the output of each part, and logits are multiplied by.
    """

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    K: int
    rope: Rope | None
    max_len: int
    recurrent: tuple[bool, ...]
    mamba: MambaSizes
    E: int
    W: int
    router: Router
    scale: float
    by_embedding: float
    by_residual: float
    by_logits: float
    eps: float = 1e-6
    act: str = "silu"
    attention_bias: bool = False
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        experts = hf.get("num_local_experts", 8)
        D, layers = hf_config.require(hf, "hidden_size"), hf_config.require(hf, "num_hidden_layers")
        types = hf_config.read_hybrid_types(hf, layers) or ("linear_attention",) * layers
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=D,
            F=hf.get("shared_intermediate_size", 1024),
            L=layers,
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            rope=hf_config.read_rope(hf) if hf.get("position_embedding_type") == "rope" else None,
            max_len=hf_config.require(hf, "max_position_embeddings"),
            recurrent=tuple(kind == "linear_attention" for kind in types),
            mamba=_read_mamba(hf, D),
            E=experts,
            W=hf_config.require(hf, "intermediate_size"),
            router=Router(top_k=hf_config.read_top_k(hf, experts, default=2) if experts else 0),
            scale=float(hf.get("attention_multiplier", 1.0)),
            by_embedding=float(hf.get("embedding_multiplier", 1.0)),
            by_residual=float(hf.get("residual_multiplier", 1.0)),
            by_logits=1 / float(hf.get("logits_scaling", 1.0)),
            eps=float(hf.get("rms_norm_eps", 1e-6)),
            act=hf_config.read_activation(hf),
            attention_bias=bool(hf.get("attention_bias", False)),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def _read_mamba(hf: HFConfig, D: int) -> MambaSizes:
    heads, bias = hf.get("mamba_n_heads", 128), bool(hf.get("mamba_proj_bias", False))
    return MambaSizes(
        D=D,
        H=heads,
        P=hf_config.read_mamba_head_dim(hf, hf.get("mamba_expand", 2) * D, heads),
        G=hf.get("mamba_n_groups", 1),
        N=hf.get("mamba_d_state", 256),
        W=hf.get("mamba_d_conv", 4),
        act=hf_config.read_activation(hf),
        eps=float(hf.get("rms_norm_eps", 1e-6)),
        conv_bias=bool(hf.get("mamba_conv_bias", True)),
        in_bias=bias,
        out_bias=bias,
        dt_limits=hf_config.read_time_step_limits(hf),
    )


def kinds(c: Config) -> tuple[AttentionSpec | RecurrenceSpec, ...]:
    """What tells the layers apart: whether they attend."""
    attends = AttentionSpec(scale=c.scale, rope="default" if c.rope else None)
    return tuple(RecurrenceSpec() if recurrent else attends for recurrent in c.recurrent)


def cache_specs(c: Config) -> tuple[CacheSpec | tuple[CacheSpec, ...], ...]:
    """The caches that each layer needs."""
    return tuple(c.mamba.caches if recurrent else KeyValueSpec(c.J, c.K) for recurrent in c.recurrent)


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    return {
        **embedding_params(c.V, c.D, tied=c.tied),
        "layers": [_layer(c, f"model.layers.{i}", recurrent) for i, recurrent in enumerate(c.recurrent)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="ones"),
    }


def _layer(c: Config, at: str, recurrent: bool) -> Tree:
    attn = {"qkv_bias": c.attention_bias, "o_bias": c.attention_bias}
    mixer = (
        mamba_params(f"{at}.mamba", c.mamba)
        if recurrent
        else attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, **attn)
    )
    shared = _shared(c, f"{at}.shared_mlp")
    return {
        "mixer_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **mixer,
        "mlp_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="ones"),
        **({**_experts(c, f"{at}.block_sparse_moe"), "shared": shared} if c.E else shared),
    }


def _shared(c: Config, at: str) -> dict[str, Param]:
    hf = f"{at}.input_linear.weight"
    return {
        "gate": param((c.D, c.F), "embed mlp", hf, "F D -> D F", rows=(0, c.F), inputs="embed"),
        "up": param((c.D, c.F), "embed mlp", hf, "F D -> D F", rows=(c.F, 2 * c.F), inputs="embed"),
        "down": param((c.F, c.D), "mlp embed", f"{at}.output_linear.weight", "D F -> F D", inputs="mlp"),
    }


def _experts(c: Config, at: str) -> dict[str, Param]:
    both, down = f"{at}.input_linear.weight", f"{at}.output_linear.weight"
    layout = "E (two F) D -> E D two F"
    return {
        **moe.router_params(f"{at}.router.layer", c.D, c.E),
        "gate_up": param((c.E, c.D, 2, c.W), "experts embed gates mlp", both, layout, inputs="embed"),
        "down": param((c.E, c.W, c.D), "experts mlp embed", down, "E D F -> E F D", inputs="mlp"),
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
    cos_sin = rope.cos_sin(c.rope, positions, c.max_len) if c.rope else None

    def attended(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = attention.qkv(x, w)
        if cos_sin is not None:
            q, k = rotate(q, *cos_sin), rotate(k, *cos_sin)
        o, cache = attend(Heads(q, k, v), cache, spec)
        return attention.output(o, w), cache

    def block(x: jax.Array, w: Tree, kind: AttentionSpec | RecurrenceSpec, cache: Any) -> tuple[jax.Array, Any]:
        h = rms_norm(x, w["mixer_norm"], c.eps)
        if isinstance(kind, RecurrenceSpec):
            o, cache = mamba(h, w, c.mamba, attend, cache)
        else:
            o, cache = attended(h, w, kind, cache)
        x = x + o * c.by_residual
        return x + moe.feed_forward(rms_norm(x, w["mlp_norm"], c.eps), w, c.router, c.act) * c.by_residual, cache

    x = embed(p["embed"], tokens, p["norm"].dtype) * c.by_embedding
    x, caches = run_layers(block, p["layers"], kinds(c), x, caches)
    return rms_norm(x, p["norm"], c.eps), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x) * c.by_logits
