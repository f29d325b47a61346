"""DeepSeek V3, R1 and V3.1 (DeepSeek-AI, 2024) and Kimi K2 (Moonshot AI, 2025): latent attention, and mixtures of
experts after some dense layers.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width of dense layers, W of an expert, L layers, E experts,
S experts that every token has; those of attention are in `nn.latent_attention`.

The layers after the last one predict tokens further ahead and are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend
from tenfold.kernels.latent_attention import LatentSpec
from tenfold.kernels.norm import rms_norm
from tenfold.nn import hf_config, moe, rope
from tenfold.nn.cache import CacheSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.latent_attention import LatentSizes, latent_attention, latent_attention_params
from tenfold.nn.mlp import mlp_params
from tenfold.nn.moe import Router
from tenfold.nn.param import Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one DeepSeek V3 checkpoint; letters as in the module's legend. `dense` layers come first."""

    V: int
    D: int
    F: int
    W: int
    L: int
    E: int
    S: int
    attention: LatentSizes
    router: Router
    dense: int
    rope: Rope
    max_len: int
    eps: float = 1e-6
    act: str = "silu"
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf_config.refuse(hf, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
        experts = hf_config.read_num_experts(hf, "n_routed_experts", default=256)
        sizes = LatentSizes.from_hf(hf)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=sizes.D,
            F=hf_config.require(hf, "intermediate_size"),
            W=hf_config.require(hf, "moe_intermediate_size"),
            L=hf_config.require(hf, "num_hidden_layers"),
            E=experts,
            S=hf.get("n_shared_experts", 1),
            attention=sizes,
            router=Router(
                top_k=hf_config.read_top_k(hf, experts, default=8),
                score="sigmoid",
                renormalize=bool(hf.get("norm_topk_prob", True)),
                scale=float(hf.get("routed_scaling_factor", 2.5)),
                groups=hf.get("n_group", 8),
                top_groups=hf.get("topk_group", 4),
            ),
            dense=hf.get("first_k_dense_replace", 3),
            rope=hf_config.read_rope({**hf, "head_dim": sizes.Kr}),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            eps=float(hf.get("rms_norm_eps", 1e-6)),
            act=hf_config.read_activation(hf),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def kinds(c: Config) -> tuple[LatentSpec, ...]:
    """What tells the layers apart: nothing in their attention."""
    return (c.attention.spec,) * c.L


def cache_specs(c: Config) -> tuple[CacheSpec, ...]:
    """The cache that each layer needs."""
    return (c.attention.cache,) * c.L


def skipped(c: Config) -> tuple[str, ...]:
    """Layers after the last, which predict tokens further ahead."""
    return (f"model.layers.{c.L}.*",)


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    return {
        **embedding_params(c.V, c.D, tied=c.tied),
        "layers": [_layer(c, f"model.layers.{i}", mixture=i >= c.dense) for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="ones"),
    }


def _layer(c: Config, at: str, *, mixture: bool) -> Tree:
    return {
        "attn_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **latent_attention_params(f"{at}.self_attn", c.attention),
        "mlp_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="ones"),
        **(_experts(c, f"{at}.mlp") if mixture else mlp_params(f"{at}.mlp", c.D, c.F)),
    }


def _experts(c: Config, at: str) -> Tree:
    return {
        **moe.router_params(f"{at}.gate", c.D, c.E, choice_bias=f"{at}.gate.e_score_correction_bias"),
        **moe.expert_params(f"{at}.experts", c.D, c.W, c.E),
        "shared": mlp_params(f"{at}.shared_experts", c.D, c.S * c.W),
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

    def block(x: jax.Array, w: Tree, spec: LatentSpec, cache: Any) -> tuple[jax.Array, Any]:
        h = rms_norm(x, w["attn_norm"], c.eps)
        o, cache = latent_attention(h, w, c.attention, cos_sin, attend, cache)
        x = x + o
        return x + moe.feed_forward(rms_norm(x, w["mlp_norm"], c.eps), w, c.router, c.act), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return rms_norm(x, p["norm"], c.eps), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
