"""GPT-2 (Radford et al., 2019): learned positions, layer norms before each part, biases everywhere.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H heads, K head dim.

Checkpoints hold matrices as inputs by outputs, and q, k and v in one. Names start with "transformer." or do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import layer_norm
from tenfold.nn import attention, hf_config
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import layer_norm_params, project
from tenfold.nn.mlp import plain_mlp
from tenfold.nn.param import Param, Tree, also_named, param
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one GPT-2 checkpoint; letters as in the module's legend."""

    V: int
    D: int
    F: int
    L: int
    H: int
    positions: int
    max_len: int
    scales: tuple[float, ...]
    eps: float = 1e-5
    act: str = "gelu_new"
    tied: bool = True

    @property
    def K(self) -> int:
        return self.D // self.H

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        D, H = hf_config.require(hf, "n_embd"), hf_config.require(hf, "n_head")
        layers = hf_config.require(hf, "n_layer")
        scale = (D // H) ** -0.5 if hf.get("scale_attn_weights", True) else 1.0
        by_layer = bool(hf.get("scale_attn_by_inverse_layer_idx", False))
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=D,
            F=hf.get("n_inner") or 4 * D,
            L=layers,
            H=H,
            positions=hf_config.require(hf, "n_positions"),
            max_len=hf_config.require(hf, "n_positions"),
            scales=tuple(scale / (i + 1) if by_layer else scale for i in range(layers)),
            eps=float(hf.get("layer_norm_epsilon", 1e-5)),
            act=hf_config.read_activation(hf, "activation_function", default="gelu_new"),
            tied=bool(hf.get("tie_word_embeddings", True)),
        )


def kinds(c: Config) -> tuple[AttentionSpec, ...]:
    """What tells the layers apart: the scale, in some."""
    return tuple(AttentionSpec(scale=scale, rope=None) for scale in c.scales)


def cache_specs(c: Config) -> tuple[CacheSpec, ...]:
    """The cache that each layer needs."""
    return (KeyValueSpec(c.H, c.K),) * c.L


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    at, head = "transformer", "lm_head.weight"
    ends: Tree = (
        {"embed": param((c.V, c.D), "vocab embed", f"{at}.wte.weight", aliases=(head,), inputs="embed")}
        if c.tied
        else {
            "embed": param((c.V, c.D), "vocab embed", f"{at}.wte.weight"),
            "head": param((c.D, c.V), "embed vocab", head, "V D -> D V", inputs="embed"),
        }
    )
    declared = {
        **ends,
        "positions": param((c.positions, c.D), "positions embed", f"{at}.wpe.weight"),
        "layers": [_layer(c, f"{at}.h.{i}") for i in range(c.L)],
        **layer_norm_params("norm", f"{at}.ln_f", c.D),
    }
    return also_named(declared, {"transformer.": ("",)})


def skipped(c: Config) -> tuple[str, ...]:
    """Masks, which old exporters saved."""
    return ("*.attn.bias",)


def _layer(c: Config, at: str) -> dict[str, Param]:
    D, F, H, K = c.D, c.F, c.H, c.K
    attn, mlp = f"{at}.attn", f"{at}.mlp"
    return {
        **layer_norm_params("attn_norm", f"{at}.ln_1", D),
        "qkv": param(
            (D, 3, H, K), "embed small heads head_dim", f"{attn}.c_attn.weight", "D (C H K) -> D C H K", inputs="embed"
        ),
        "qkv_bias": param((3, H, K), "small heads head_dim", f"{attn}.c_attn.bias", "(C H K) -> C H K", init="zeros"),
        "o": param(
            (H, K, D), "heads head_dim embed", f"{attn}.c_proj.weight", "(H K) D -> H K D", inputs="heads head_dim"
        ),
        "o_bias": param((D,), "embed", f"{attn}.c_proj.bias", init="zeros"),
        **layer_norm_params("mlp_norm", f"{at}.ln_2", D),
        "up": param((D, F), "embed mlp", f"{mlp}.c_fc.weight", inputs="embed"),
        "up_bias": param((F,), "mlp", f"{mlp}.c_fc.bias", init="zeros"),
        "down": param((F, D), "mlp embed", f"{mlp}.c_proj.weight", inputs="mlp"),
        "down_bias": param((D,), "embed", f"{mlp}.c_proj.bias", init="zeros"),
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

    def norm(x: jax.Array, w: Tree, name: str) -> jax.Array:
        return layer_norm(x, w[name], w[f"{name}_bias"], c.eps)

    def block(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        qkv = project(norm(x, w, "attn_norm"), w["qkv"], w["qkv_bias"])
        o, cache = attend(Heads(qkv[:, 0], qkv[:, 1], qkv[:, 2]), cache, spec)
        x = x + attention.output(o, w)
        return x + plain_mlp(norm(x, w, "mlp_norm"), w, c.act), cache

    dtype = p["norm"].dtype
    x = embed(p["embed"], tokens, dtype) + embed(p["positions"], positions, dtype)
    x, caches = run_layers(block, p["layers"], kinds(c), x, caches)
    return norm(x, p, "norm"), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
