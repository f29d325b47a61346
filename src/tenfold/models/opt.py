"""OPT (Zhang et al., 2022): learned positions, biases everywhere, relu, and norms before each part or after.

Dims: T packed tokens, V vocabulary, E width of the embeddings (which one size projects to and from D), D width,
F feed-forward width, L layers, H heads, K head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import layer_norm
from tenfold.nn import attention, hf_config
from tenfold.nn.attention import output_params, qkv_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import layer_norm_params, project
from tenfold.nn.mlp import plain_mlp, plain_mlp_params
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.stack import run_layers

FIRST_POSITION = 2  # the table's first rows are never used
EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one OPT checkpoint; letters as in the module's legend."""

    V: int
    E: int
    D: int
    F: int
    L: int
    H: int
    positions: int
    max_len: int
    norm_first: bool = True
    last_norm: bool = True
    act: str = "relu"
    bias: bool = True
    tied: bool = True

    @property
    def K(self) -> int:
        return self.D // self.H

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf_config.refuse(hf, layer_norm_elementwise_affine=True)
        norm_first = bool(hf.get("do_layer_norm_before", True))
        longest = hf_config.require(hf, "max_position_embeddings")
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            E=hf.get("word_embed_proj_dim") or hf_config.require(hf, "hidden_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=hf_config.require(hf, "ffn_dim"),
            L=hf_config.require(hf, "num_hidden_layers"),
            H=hf_config.require(hf, "num_attention_heads"),
            positions=longest,
            max_len=longest,
            norm_first=norm_first,
            last_norm=norm_first and not hf.get("_remove_final_layer_norm", False),
            act=hf_config.read_activation(hf, "activation_function", default="relu"),
            bias=bool(hf.get("enable_bias", True)),
            tied=bool(hf.get("tie_word_embeddings", True)),
        )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: nothing."""
    return (AttentionSpec(scale=c.K**-0.5, rope=None),) * c.L


def cache_specs(c: Config) -> tuple[CacheSpec, ...]:
    """The cache that each layer needs."""
    return (KeyValueSpec(c.H, c.K),) * c.L


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    at, head = "model.decoder", "lm_head.weight"
    names = {"aliases": (head,), "inputs": "embed"} if c.tied else {}
    declared: Tree = {
        "embed": param((c.V, c.E), "vocab embed", f"{at}.embed_tokens.weight", **names),
        "positions": param((FIRST_POSITION + c.positions, c.D), "positions embed", f"{at}.embed_positions.weight"),
        "layers": [_layer(c, f"{at}.layers.{i}") for i in range(c.L)],
    }
    if not c.tied:
        declared["head"] = param((c.E, c.V), "embed vocab", head, "V E -> E V", inputs="embed")
    if c.last_norm:
        declared |= layer_norm_params("norm", f"{at}.final_layer_norm", c.D)
    if c.E != c.D:
        declared["project_in"] = param((c.E, c.D), "mlp embed", f"{at}.project_in.weight", "D E -> E D", inputs="mlp")
        declared["project_out"] = param(
            (c.D, c.E), "embed mlp", f"{at}.project_out.weight", "E D -> D E", inputs="embed"
        )
    return declared


def _layer(c: Config, at: str) -> dict[str, Param]:
    return {
        **layer_norm_params("attn_norm", f"{at}.self_attn_layer_norm", c.D),
        **qkv_params(f"{at}.self_attn", c.D, c.H, c.H, c.K, bias=c.bias),
        **output_params(f"{at}.self_attn.out_proj", c.D, c.H, c.K, bias=c.bias),
        **layer_norm_params("mlp_norm", f"{at}.final_layer_norm", c.D),
        **plain_mlp_params(f"{at}.fc1", f"{at}.fc2", c.D, c.F, bias=c.bias),
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

    def norm(x: jax.Array, w: Tree, name: str, *, here: bool) -> jax.Array:
        return layer_norm(x, w[name], w[f"{name}_bias"], EPS) if here else x

    def block(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        o, cache = attend(Heads(*attention.qkv(norm(x, w, "attn_norm", here=c.norm_first), w)), cache, spec)
        x = norm(x + attention.output(o, w), w, "attn_norm", here=not c.norm_first)
        y = plain_mlp(norm(x, w, "mlp_norm", here=c.norm_first), w, c.act)
        return norm(x + y, w, "mlp_norm", here=not c.norm_first), cache

    dtype = p["positions"].dtype
    x = embed(p["embed"], tokens, dtype)
    x = project(x, p["project_in"]) if "project_in" in p else x
    x = x + embed(p["positions"], positions + FIRST_POSITION, dtype)
    x, caches = run_layers(block, p["layers"], kinds(c), x, caches)
    return norm(x, p, "norm", here=c.last_norm), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, project(x, p["project_out"]) if "project_out" in p else x)
