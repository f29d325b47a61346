"""Falcon H1 (Zuo et al., 2025): attention and Mamba 2 side by side in every layer, and a multiplier for everything.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H query heads, J key-value heads,
K head dim.
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
from tenfold.nn.attention import attention_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import activation, project, project_all, rotate
from tenfold.nn.mamba import MambaSizes, mamba, mamba_params
from tenfold.nn.mlp import mlp_params
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """What parts of the model are multiplied by, named as in `config.json` without their `_multiplier`."""

    embedding: float
    lm_head: float
    mlp: tuple[float, float]
    key: float
    attention_in: float
    attention_out: float
    ssm_in: float
    ssm_out: float

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Multipliers":
        """Reads `config.json`."""
        names = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
        gate, down = hf.get("mlp_multipliers") or (1.0, 1.0)
        return cls(mlp=(gate, down), **{name: float(hf.get(f"{name}_multiplier") or 1.0) for name in names})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Falcon H1 checkpoint; letters as in the module's legend."""

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    K: int
    rope: Rope
    max_len: int
    mamba: MambaSizes
    multipliers: Multipliers
    eps: float = 1e-5
    act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        D = hf_config.require(hf, "hidden_size")
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=D,
            F=hf_config.require(hf, "intermediate_size"),
            L=hf_config.require(hf, "num_hidden_layers"),
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            rope=hf_config.read_rope(hf),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            mamba=_read_mamba(hf, D),
            multipliers=Multipliers.from_hf(hf),
            eps=float(hf.get("rms_norm_eps", 1e-5)),
            act=hf_config.read_activation(hf),
            attention_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def _read_mamba(hf: HFConfig, D: int) -> MambaSizes:
    heads = hf.get("mamba_n_heads", 128)
    inner = hf["mamba_d_ssm"] if hf.get("mamba_d_ssm") is not None else hf.get("mamba_expand", 2) * D
    if "mamba_d_ssm" not in hf:
        inner = 1024
    before = bool(hf.get("mamba_norm_before_gate", True))
    return MambaSizes(
        D=D,
        H=heads,
        P=hf_config.read_mamba_head_dim(hf, inner, heads),
        G=hf.get("mamba_n_groups", 1),
        N=hf.get("mamba_d_state", 256),
        W=hf.get("mamba_d_conv", 4),
        act=hf_config.read_activation(hf),
        eps=float(hf.get("rms_norm_eps", 1e-5)),
        norm=("before" if before else "after") if hf.get("mamba_rms_norm", False) else None,
        conv_bias=bool(hf.get("mamba_conv_bias", True)),
        in_bias=bool(hf.get("mamba_proj_bias", False)),
        out_bias=bool(hf.get("projectors_bias", False)),
        dt_limits=hf_config.read_time_step_limits(hf),
        scales=tuple(hf.get("ssm_multipliers") or (1.0,) * 5),
    )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """All layers are alike."""
    return (AttentionSpec(scale=c.K**-0.5),) * c.L


def cache_specs(c: Config) -> tuple[tuple[CacheSpec, ...], ...]:
    """The caches that each layer needs: keys and values, and what the recurrence remembers."""
    return ((KeyValueSpec(c.J, c.K), *c.mamba.caches),) * c.L


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    return {
        **embedding_params(c.V, c.D, tied=c.tied),
        "layers": [_layer(c, f"model.layers.{i}") for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.final_layernorm.weight", init="ones"),
    }


def _layer(c: Config, at: str) -> dict[str, Param | dict[str, Param]]:
    return {
        "mixer_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="ones"),
        **attention_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, qkv_bias=c.attention_bias, o_bias=c.attention_bias),
        "mamba": mamba_params(f"{at}.mamba", c.mamba),
        "mlp_norm": param((c.D,), "embed", f"{at}.pre_ff_layernorm.weight", init="ones"),
        **mlp_params(f"{at}.feed_forward", c.D, c.F, bias=c.mlp_bias),
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
    cos_sin, by = rope.cos_sin(c.rope, positions, c.max_len), c.multipliers

    def attended(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = attention.qkv(x * by.attention_in, w)
        heads = Heads(rotate(q, *cos_sin), rotate(k * by.key, *cos_sin), v)
        o, cache = attend(heads, cache, spec)
        return attention.output(o, w) * by.attention_out, cache

    def block(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        attention_cache, *mamba_caches = cache or (None, None, None)
        h = rms_norm(x, w["mixer_norm"], c.eps)
        m, mamba_caches = mamba(h * by.ssm_in, w["mamba"], c.mamba, attend, mamba_caches)
        o, attention_cache = attended(h, w, spec, attention_cache)
        x = x + m * by.ssm_out + o
        h = rms_norm(x, w["mlp_norm"], c.eps)
        gate, up = project_all(h, (w["gate"], w.get("gate_bias")), (w["up"], w.get("up_bias")))
        h = activation(c.act)(gate * by.mlp[0]) * up
        return x + project(h, w["down"], w.get("down_bias")) * by.mlp[1], (attention_cache, *mamba_caches)

    x = embed(p["embed"], tokens, p["norm"].dtype)
    x, caches = run_layers(block, p["layers"], kinds(c), x * jnp.asarray(by.embedding, x.dtype), caches)
    return rms_norm(x, p["norm"], c.eps), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x) * c.multipliers.lm_head
