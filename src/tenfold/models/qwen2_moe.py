"""Qwen 1.5 and 2 with mixtures of experts (Yang et al., 2024): Qwen 2, with experts and one that every token has.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width of dense layers, W of an expert, S of the shared
expert, L layers, H query heads, J key-value heads, K head dim, E experts.
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
from tenfold.nn.layers import rotate
from tenfold.nn.mlp import mlp_params
from tenfold.nn.moe import Router
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Qwen 2 MoE checkpoint; letters as in the module's legend.

    `mixtures` says which layers have experts; those also have a shared one, weighed by a gate of its own.
    """

    V: int
    D: int
    F: int
    W: int
    S: int
    L: int
    H: int
    J: int
    K: int
    E: int
    router: Router
    mixtures: tuple[bool, ...]
    rope: Rope
    max_len: int
    windows: tuple[int | None, ...]
    eps: float = 1e-6
    act: str = "silu"
    qkv_bias: bool = True
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        layers, experts = (
            hf_config.require(hf, "num_hidden_layers"),
            hf_config.read_num_experts(hf, "num_experts", default=60),
        )
        step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or ()
        window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
        types = hf_config.read_given_layer_types(hf, layers)
        if types is None:  # every other one of the first `max_window_layers` is sliding
            most = 0 if window is None else hf.get("max_window_layers", 28)
            sliding = [i % 2 == 0 and i < most for i in range(layers)]
            types = tuple("sliding_attention" if slides else "full_attention" for slides in sliding)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size"),
            W=hf_config.require(hf, "moe_intermediate_size"),
            S=hf_config.require(hf, "shared_expert_intermediate_size"),
            L=layers,
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            E=experts,
            router=Router(
                top_k=hf_config.read_top_k(hf, experts, default=4), renormalize=bool(hf.get("norm_topk_prob", False))
            ),
            mixtures=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
            rope=hf_config.read_rope(hf),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            windows=hf_config.read_windows(types, window),
            eps=float(hf.get("rms_norm_eps", 1e-6)),
            act=hf_config.read_activation(hf),
            qkv_bias=bool(hf.get("qkv_bias", True)),
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
        "layers": [_layer(c, f"model.layers.{i}", c.mixtures[i]) for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="ones"),
    }


def _layer(c: Config, at: str, mixture: bool) -> dict[str, Param]:
    return {
        "attn_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, qkv_bias=c.qkv_bias),
        "mlp_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="ones"),
        **(_experts(c, f"{at}.mlp") if mixture else mlp_params(f"{at}.mlp", c.D, c.F)),
    }


def _experts(c: Config, at: str) -> Tree:
    return {
        **moe.router_params(f"{at}.gate", c.D, c.E),
        **moe.expert_params(f"{at}.experts", c.D, c.W, c.E),
        "shared": mlp_params(f"{at}.shared_expert", c.D, c.S),
        "shared_gate": moe.shared_gate_param(f"{at}.shared_expert_gate", c.D),
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
        return x + moe.feed_forward(rms_norm(x, w["mlp_norm"], c.eps), w, c.router, c.act), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return rms_norm(x, p["norm"], c.eps), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
