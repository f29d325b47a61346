"""Nemotron H and Nemotron 3 (NVIDIA, 2025): layers of one part each, Mamba 2, attention without rotation, a plain
feed-forward, or a mixture of plain experts.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H query heads, J key-value heads,
K head dim, E experts, W feed-forward width of one, S of the one that every token has, N what experts see of a token.

The layers that predict tokens further ahead are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.kernels.recurrence import RecurrenceSpec
from tenfold.nn import attention, hf_config, moe
from tenfold.nn.attention import attention_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import activation
from tenfold.nn.mamba import MambaSizes, mamba, mamba_params
from tenfold.nn.mlp import plain_mlp, plain_mlp_params
from tenfold.nn.moe import Router
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.stack import run_layers

PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
DEFAULT = "ME*-"


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Nemotron H checkpoint; letters as in the module's legend.

    Attributes:
        types: of each layer: "linear_attention", "full_attention", "mlp" or "moe".
        N: None where experts see the whole token.
    """

    V: int
    D: int
    F: int
    H: int
    J: int
    K: int
    max_len: int
    types: tuple[str, ...]
    mamba: MambaSizes
    E: int
    W: int
    S: int
    N: int | None
    router: Router
    eps: float = 1e-5
    act: str = "relu2"
    mlp_bias: bool = False
    tied: bool = False

    @property
    def L(self) -> int:
        return len(self.types)

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf_config.refuse(hf, sliding_window=None, attention_bias=False, residual_in_fp32=False)
        D, experts = hf_config.require(hf, "hidden_size"), hf_config.read_num_experts(hf, "n_routed_experts", default=8)
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=D,
            F=hf.get("intermediate_size", 21504),
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim({"head_dim": hf.get("attention_head_dim") or 128, **hf}),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            types=_read_types(hf),
            mamba=_read_mamba(hf, D),
            E=experts,
            W=hf.get("moe_intermediate_size", 7688),
            S=hf.get("moe_shared_expert_intermediate_size", 7688),
            N=hf.get("moe_latent_size"),
            router=Router(
                top_k=hf_config.read_top_k(hf, experts, default=2),
                score="sigmoid",
                renormalize=bool(hf.get("norm_topk_prob", True)),
                scale=float(hf.get("routed_scaling_factor", 1.0)),
                groups=hf.get("n_group", 1),
                top_groups=hf.get("topk_group", 1),
            ),
            eps=float(hf.get("layer_norm_epsilon", 1e-5)),
            act=hf_config.read_activation(hf, "mlp_hidden_act", default="relu2"),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def _read_types(hf: HFConfig) -> tuple[str, ...]:
    """What each layer is. transformers 4 writes a letter for each, as `hybrid_override_pattern`."""
    given = hf.get("layer_types") or hf.get("layers_block_type")
    given = given or [PATTERN.get(letter, letter) for letter in hf.get("hybrid_override_pattern") or DEFAULT]
    types = hf_config.read_hybrid_types({"layer_types": given}, len(given), tuple(PATTERN.values()))
    assert types is not None, "of a list that is not empty"
    return types


def _read_mamba(hf: HFConfig, D: int) -> MambaSizes:
    bias = bool(hf.get("use_bias", False))
    return MambaSizes(
        D=D,
        H=hf.get("mamba_num_heads", 128),
        P=hf.get("mamba_head_dim", 64),
        G=hf.get("mamba_n_groups") or hf.get("n_groups", 8),
        N=hf.get("ssm_state_size", 128),
        W=hf.get("mamba_d_conv") or hf.get("conv_kernel", 4),
        act=hf_config.read_activation(hf, "mamba_hidden_act"),
        eps=float(hf.get("layer_norm_epsilon", 1e-5)),
        conv_bias=bool(hf.get("mamba_conv_bias", hf.get("use_conv_bias", True))),
        in_bias=bias,
        out_bias=bias,
        dt_limits=hf_config.read_time_step_limits({"time_step_limit": hf.get("mamba_dt_limit"), **hf}),
    )


def kinds(c: Config) -> tuple[AttentionSpec | RecurrenceSpec | None, ...]:
    """What tells the layers apart: how they mix tokens; None where they do not."""
    specs = {"linear_attention": RecurrenceSpec(), "full_attention": AttentionSpec(scale=c.K**-0.5, rope=None)}
    return tuple(specs.get(kind) for kind in c.types)


def cache_specs(c: Config) -> tuple[CacheSpec | tuple[CacheSpec, ...], ...]:
    """The caches that each layer needs."""
    specs = {"linear_attention": c.mamba.caches, "full_attention": KeyValueSpec(c.J, c.K)}
    return tuple(specs.get(kind, ()) for kind in c.types)


def skipped(c: Config) -> tuple[str, ...]:
    """Layers that predict tokens further ahead."""
    return ("mtp.*",)


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    embedding, head = "backbone.embeddings.weight", "lm_head.weight"
    tied = {"embed": param((c.V, c.D), "vocab embed", embedding, aliases=(head,), inputs="embed")}
    untied = {
        "embed": param((c.V, c.D), "vocab embed", embedding),
        "head": param((c.D, c.V), "embed vocab", head, "V D -> D V", inputs="embed"),
    }
    return {
        **(tied if c.tied else untied),
        "layers": [_layer(c, f"backbone.layers.{i}", kind) for i, kind in enumerate(c.types)],
        "norm": param((c.D,), "embed", "backbone.norm_f.weight", init="ones"),
    }


def _layer(c: Config, at: str, kind: str) -> Tree:
    norm = {"pre_norm": param((c.D,), "embed", f"{at}.norm.weight", init="ones")}
    if kind == "linear_attention":
        return norm | mamba_params(f"{at}.mixer", c.mamba)
    if kind == "full_attention":
        return norm | attention_params(f"{at}.mixer", c.D, c.H, c.J, c.K)
    return norm | (_experts(c, f"{at}.mixer") if kind == "moe" else _mlp(c, f"{at}.mixer", c.F))


def _mlp(c: Config, at: str, width: int) -> dict[str, Param]:
    return plain_mlp_params(f"{at}.up_proj", f"{at}.down_proj", c.D, width, bias=c.mlp_bias)


def _experts(c: Config, at: str) -> Tree:
    declared = {
        **moe.router_params(f"{at}.gate", c.D, c.E, choice_bias=f"{at}.gate.e_score_correction_bias"),
        **moe.expert_params(f"{at}.experts", c.N or c.D, c.W, c.E, names=("up_proj", "down_proj")),
        "shared": _mlp(c, f"{at}.shared_experts", c.S),
    }
    if c.N:
        names = f"{at}.fc1_latent_proj", f"{at}.fc2_latent_proj"
        declared |= moe.narrowing_params(*names, c.D, c.N, bias=c.mlp_bias)
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

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return rms_norm(x, weight, c.eps, offset=0.0)

    def block(x: jax.Array, w: Tree, kind: AttentionSpec | RecurrenceSpec | None, cache: Any) -> tuple[jax.Array, Any]:
        h = norm(x, w["pre_norm"])
        if isinstance(kind, RecurrenceSpec):
            h, cache = mamba(h, w, c.mamba, attend, cache)
        elif kind is not None:
            h, cache = attend(Heads(*attention.qkv(h, w)), cache, kind)
            h = attention.output(h, w)
        elif "router" in w:
            h = moe.mixture(h, w, c.router, activation(c.act))
        else:
            h = plain_mlp(h, w, c.act)
        return x + h, cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return norm(x, p["norm"]), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
