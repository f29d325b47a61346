"""Nemotron H (NVIDIA, 2025): layers of one part each, Mamba 2, attention without rotation, or a feed-forward.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H query heads, J key-value heads,
K head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tenfold.base.errors import UnsupportedModelError
from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.kernels.recurrence import RecurrenceSpec
from tenfold.nn import attention, hf_config
from tenfold.nn.attention import attention_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import activation, project
from tenfold.nn.mamba import MambaSizes, mamba, mamba_params
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.stack import run_layers

PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Nemotron H checkpoint; letters as in the module's legend.

    Attributes:
        types: of each layer: "linear_attention", "full_attention" or "mlp".
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
        D = hf_config.require(hf, "hidden_size")
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
            eps=float(hf.get("layer_norm_epsilon", 1e-5)),
            act=hf_config.read_activation(hf, "mlp_hidden_act", default="relu2"),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def _read_types(hf: HFConfig) -> tuple[str, ...]:
    """What each layer is. transformers 4 writes a letter for each, as `hybrid_override_pattern`."""
    given = (
        hf.get("layer_types")
        or hf.get("layers_block_type")
        or [PATTERN.get(letter, letter) for letter in hf.get("hybrid_override_pattern") or ""]
    )
    types = hf_config.read_hybrid_types({"layer_types": given}, len(given), tuple(PATTERN.values()))
    if types is None or "moe" in types:
        raise UnsupportedModelError(
            "config.json asks for layers of experts (moe), which are not implemented for nemotron_h"
        )
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


def _layer(c: Config, at: str, kind: str) -> dict[str, Param]:
    norm = {"pre_norm": param((c.D,), "embed", f"{at}.norm.weight", init="ones")}
    if kind == "linear_attention":
        return norm | mamba_params(f"{at}.mixer", c.mamba)
    if kind == "full_attention":
        return norm | attention_params(f"{at}.mixer", c.D, c.H, c.J, c.K)
    declared = {
        "up": param((c.D, c.F), "embed mlp", f"{at}.mixer.up_proj.weight", "F D -> D F", inputs="embed"),
        "down": param((c.F, c.D), "mlp embed", f"{at}.mixer.down_proj.weight", "D F -> F D", inputs="mlp"),
    }
    if c.mlp_bias:
        declared["up_bias"] = param((c.F,), "mlp", f"{at}.mixer.up_proj.bias", init="zeros")
        declared["down_bias"] = param((c.D,), "embed", f"{at}.mixer.down_proj.bias", init="zeros")
    return norm | declared


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
        else:
            h = project(activation(c.act)(project(h, w["up"], w.get("up_bias"))), w["down"], w.get("down_bias"))
        return x + h, cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return norm(x, p["norm"]), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
