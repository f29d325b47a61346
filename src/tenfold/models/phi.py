"""Phi-1, 1.5 and 2 (Gunasekar et al., 2023): attention and feed-forward side by side, biases everywhere.

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
from tenfold.kernels.norm import layer_norm
from tenfold.nn import attention, hf_config, rope
from tenfold.nn.attention import output_params, qkv_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import layer_norm_params, rotate
from tenfold.nn.mlp import plain_mlp, plain_mlp_params
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Phi checkpoint; letters as in the module's legend."""

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    K: int
    rope: Rope
    max_len: int
    eps: float = 1e-5
    act: str = "gelu_new"
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf_config.refuse(hf, qk_layernorm=False)
        hf = {"partial_rotary_factor": 0.5, **hf}
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "intermediate_size"),
            L=hf_config.require(hf, "num_hidden_layers"),
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            rope=hf_config.read_rope(hf),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            eps=float(hf.get("layer_norm_eps", 1e-5)),
            act=hf_config.read_activation(hf, default="gelu_new"),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: nothing."""
    return (AttentionSpec(scale=c.K**-0.5),) * c.L


def cache_specs(c: Config) -> tuple[CacheSpec, ...]:
    """The cache that each layer needs."""
    return (KeyValueSpec(c.J, c.K),) * c.L


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    return {
        **embedding_params(c.V, c.D, tied=c.tied),
        "head_bias": param((c.V,), "vocab", "lm_head.bias", init="zeros"),
        "layers": [_layer(c, f"model.layers.{i}") for i in range(c.L)],
        **layer_norm_params("norm", "model.final_layernorm", c.D),
    }


def _layer(c: Config, at: str) -> dict[str, Param]:
    return {
        **layer_norm_params("norm", f"{at}.input_layernorm", c.D),
        **qkv_params(f"{at}.self_attn", c.D, c.H, c.J, c.K, bias=True),
        **output_params(f"{at}.self_attn.dense", c.D, c.H, c.K, bias=True),
        **plain_mlp_params(f"{at}.mlp.fc1", f"{at}.mlp.fc2", c.D, c.F),
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
        normed = layer_norm(x, w["norm"], w["norm_bias"], c.eps)
        q, k, v = attention.qkv(normed, w)
        o, cache = attend(Heads(rotate(q, *cos_sin), rotate(k, *cos_sin), v), cache, spec)
        return x + attention.output(o, w) + plain_mlp(normed, w, c.act), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return layer_norm(x, p["norm"], p["norm_bias"], c.eps), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x) + p["head_bias"].astype(jnp.float32)[None]
