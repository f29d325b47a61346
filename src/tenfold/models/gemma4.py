"""Gemma 4, text (Gemma Team, 2026): Gemma 3 with inputs per layer, wider full layers, and caches that layers share.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H query heads, J key-value heads,
K head dim, E vocabulary of the layers' own inputs, P their width.

Heads of full layers are wider than those of sliding ones, and of their pairs of dims only the first turn. The values of
full layers may be their keys, before these are scaled and rotated. The last layers may compute no keys and values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.base.errors import ConfigError, UnsupportedModelError
from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.nn import attention, hf_config, rope
from tenfold.nn.attention import head_norm_params, output_params, qkv_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import activation, project, project_all, rotate, times
from tenfold.nn.mlp import gated_mlp, mlp_params
from tenfold.nn.multimodal import TOWERS, text_config, text_params
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers

READS_PER_LAYER_CONFIG = True
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Gemma 4 checkpoint; letters as in the module's legend.

    Attributes:
        F, J, K: of each layer.
        P: 0 if layers have no inputs of their own.
        sources: for each layer the one whose cache it reads in place of its own, or None.
        values_are_keys: of full layers.
    """

    V: int
    D: int
    F: tuple[int, ...]
    L: int
    H: int
    J: tuple[int, ...]
    K: tuple[int, ...]
    E: int
    P: int
    rope: Rope
    sliding_rope: Rope
    max_len: int
    windows: tuple[int | None, ...]
    sources: tuple[int | None, ...]
    values_are_keys: bool
    final_softcap: float | None = None
    eps: float = 1e-6
    act: str = "gelu_pytorch_tanh"
    attention_bias: bool = False
    tied: bool = True

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf = {"head_dim": 256, **text_config(hf, per_layer=True)}
        if hf.get("use_bidirectional_attention") != "vision":  # which leaves text as it is
            hf_config.refuse(hf, use_bidirectional_attention=None)
        hf_config.refuse(hf, enable_moe_block=False)
        layers = hf_config.require(hf, "num_hidden_layers")
        types = (*hf_config.read_layer_types(hf, period=6, num_layers=layers)[:-1], "full_attention")
        sources = hf_config.read_cache_sources(types, hf.get("num_kv_shared_layers", 0))
        width = hf_config.require(hf, "intermediate_size")
        wider = bool(hf.get("use_double_wide_mlp", False))
        heads = _read_heads(hf, types)
        dims = dict(zip(types, (K for _, K in heads), strict=True))
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=tuple(width if source is None or not wider else 2 * width for source in sources),
            L=layers,
            H=hf_config.require(hf, "num_attention_heads"),
            J=tuple(J for J, _ in heads),
            K=tuple(K for _, K in heads),
            E=hf.get("vocab_size_per_layer_input") or hf_config.require(hf, "vocab_size"),
            P=hf.get("hidden_size_per_layer_input", 256) or 0,
            rope=_read_rope(hf, "full_attention", dims),
            sliding_rope=_read_rope(hf, "sliding_attention", dims),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            windows=hf_config.read_windows(types, hf.get("sliding_window", 512)),
            sources=sources,
            values_are_keys=bool(hf.get("attention_k_eq_v", False)),
            final_softcap=hf.get("final_logit_softcapping"),
            eps=float(hf.get("rms_norm_eps", 1e-6)),
            act=hf_config.read_activation(hf, "hidden_activation", default="gelu_pytorch_tanh"),
            attention_bias=bool(hf.get("attention_bias", False)),
            tied=bool(hf.get("tie_word_embeddings", True)),
        )


def _read_heads(hf: HFConfig, types: Sequence[str]) -> list[tuple[int, int]]:
    """Key-value heads and their dims in each layer: by layer, as transformers 5 writes, or one pair for full layers."""
    given: Mapping[str, Mapping[str, Any]] | None = hf.get("per_layer_config")
    if given is None:
        full = {"head_dim": hf.get("global_head_dim") or 512}
        if hf.get("attention_k_eq_v") and hf.get("num_global_key_value_heads"):
            full["num_key_value_heads"] = hf["num_global_key_value_heads"]
        own = [full if kind == "full_attention" else {} for kind in types]
    else:
        by_layer = {int(layer): dict(values) for layer, values in given.items()}
        own = [by_layer.get(i, {}) for i in range(len(types))]
    unknown = sorted({key for values in own for key in values} - {"head_dim", "num_key_value_heads"})
    if unknown:
        raise UnsupportedModelError(f"config.json has {unknown} in per_layer_config, which is not implemented")
    heads = [(hf_config.kv_heads({**hf, **values}), hf_config.head_dim({**hf, **values})) for values in own]
    if any(len({pair for pair, each in zip(heads, types, strict=True) if each == kind}) > 1 for kind in types):
        raise ConfigError("config.json gives layers of one type heads of different sizes in per_layer_config")
    return heads


def _read_rope(hf: HFConfig, layer_type: str, dims: Mapping[str, int]) -> Rope:
    own = {"rope_parameters": hf.get("rope_parameters") or ROPES, "head_dim": dims.get(layer_type, hf["head_dim"])}
    return hf_config.read_rope({**hf, **own}, layer_type=layer_type)


@dataclass(frozen=True)
class Kind(AttentionSpec):
    """What tells the layers apart: the window, and with it the rotation; whose cache it reads."""

    shared: bool = False


def kinds(c: Config) -> tuple[Kind, ...]:
    """What tells the layers apart."""
    return tuple(
        Kind(scale=1.0, window=window, rope="full" if window is None else "sliding", shared=source is not None)
        for window, source in zip(c.windows, c.sources, strict=True)
    )


def cache_specs(c: Config) -> tuple[CacheSpec | tuple[CacheSpec, ...], ...]:
    """The cache that each layer needs; none where it reads another's."""
    layers = zip(c.J, c.K, c.windows, c.sources, strict=True)
    return tuple(KeyValueSpec(J, K, window) if source is None else () for J, K, window, source in layers)


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    declared = {
        **embedding_params(c.V, c.D, tied=c.tied),
        "layers": [_layer(c, i) for i in range(c.L)],
        "norm": param((c.D,), "embed", "model.norm.weight", init="ones"),
    }
    if c.P:
        wide = c.L * c.P
        declared |= {
            "own_embed": param((c.E, wide), "vocab embed", "model.embed_tokens_per_layer.weight"),
            "own": _matrix((c.D, wide), "embed mlp", "model.per_layer_model_projection.weight"),
            "own_norm": param((c.P,), "head_dim", "model.per_layer_projection_norm.weight", init="ones"),
        }
    return text_params(declared)


def skipped(c: Config) -> tuple[str, ...]:
    """Other modalities, and keys and values of layers that read another's."""
    shared = (i for i, source in enumerate(c.sources) if source is not None)
    return (*TOWERS, *(f"*.layers.{i}.self_attn.{name}.*" for i in shared for name in ("[kv]_proj", "[kv]_norm")))


def _matrix(shape: tuple[int, int], axes: str, hf: str) -> Param:
    return param(shape, axes, hf, "O I -> I O", inputs=axes.split()[0])


def _layer(c: Config, i: int) -> dict[str, Param]:
    at, D, P, J, K = f"model.layers.{i}", c.D, c.P, c.J[i], c.K[i]
    heads = {
        **qkv_params(f"{at}.self_attn", D, c.H, J, K, bias=c.attention_bias),
        **head_norm_params(f"{at}.self_attn", K),
    }
    if c.sources[i] is not None:
        heads = {name: heads[name] for name in heads if name.startswith("q")}
    elif c.values_are_keys and c.windows[i] is None:
        heads = {name: heads[name] for name in heads if not name.startswith("v")}

    def norm(name: str) -> Param:
        return param((D,), "embed", f"{at}.{name}.weight", init="ones")

    declared = {
        "attn_norm": norm("input_layernorm"),
        **heads,
        **output_params(f"{at}.self_attn.o_proj", D, c.H, K, bias=c.attention_bias),
        "attn_post_norm": norm("post_attention_layernorm"),
        "mlp_norm": norm("pre_feedforward_layernorm"),
        **mlp_params(f"{at}.mlp", D, c.F[i]),
        "mlp_post_norm": norm("post_feedforward_layernorm"),
        "scale": param((1,), "small", f"{at}.layer_scalar", init="ones"),
    }
    if P:
        declared |= {
            "own_gate": _matrix((D, P), "embed small", f"{at}.per_layer_input_gate.weight"),
            "own_up": _matrix((P, D), "small embed", f"{at}.per_layer_projection.weight"),
            "own_post_norm": norm("post_per_layer_input_norm"),
        }
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
    ropes = {"full": c.rope, "sliding": c.sliding_rope}
    angles = {name: rope.cos_sin(ropes[name], positions, c.max_len) for name in ropes}

    def block(carried: Any, w: Tree, spec: Kind, cache: Any) -> tuple[Any, Any]:
        x, own_TLP, layer = carried
        heads = _heads(c, _norm(c, x, w["attn_norm"]), w, angles[spec.rope or "full"])
        o, cache = attend(heads, cache, spec)
        x = x + _norm(c, attention.output(o, w), w["attn_post_norm"])
        x = x + _norm(c, gated_mlp(_norm(c, x, w["mlp_norm"]), w, c.act), w["mlp_post_norm"])
        if own_TLP is not None:
            y = activation(c.act)(project(x, w["own_gate"])) * own_TLP[:, layer]
            x = x + _norm(c, project(y, w["own_up"]), w["own_post_norm"])
        return (x * w["scale"][None], own_TLP, layer + 1), cache

    # The factor is rounded to the weights' dtype, as in training.
    x = embed(p["embed"], tokens, p["norm"].dtype) * jnp.asarray(c.D**0.5, p["norm"].dtype)
    first = (x, _own_inputs(p, c, tokens, x) if c.P else None, jnp.int32(0))
    (x, _, _), caches = run_layers(block, p["layers"], kinds(c), first, caches, sources=c.sources)
    return _norm(c, x, p["norm"]), caches


def _norm(c: Config, x: jax.Array, weight: jax.Array) -> jax.Array:
    return rms_norm(x, weight, c.eps, offset=0.0)


def _own_inputs(p: Tree, c: Config, tokens: Int[Array, " T"], x: Float[Array, "T D"]) -> Float[Array, "T L P"]:
    """What each layer is told of each token: an embedding of its own, and a projection of the common one."""
    embedded = embed(p["own_embed"], tokens, x.dtype) * jnp.asarray(c.P**0.5, x.dtype)
    projected = times(project(x, p["own"]), c.D**-0.5).reshape(-1, c.L, c.P)
    return times(_norm(c, projected, p["own_norm"]) + embedded.reshape(-1, c.L, c.P), 2**-0.5)


def _heads(c: Config, x: Float[Array, "T D"], w: Tree, cos_sin: tuple[jax.Array, jax.Array]) -> Heads:
    wanted = [name for name in "qkv" if name in w]
    q, *kv = project_all(x, *((w[name], w.get(f"{name}_bias")) for name in wanted))
    q = rotate(_norm(c, q, w["q_norm"]), *cos_sin)
    if not kv:
        return Heads(q, None, None)
    k = rotate(_norm(c, kv[0], w["k_norm"]), *cos_sin)
    return Heads(q, k, _norm(c, kv[-1], jnp.ones_like(w["k_norm"])))


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states, soft-capped where the config says so."""
    return unembed(p, x, softcap=c.final_softcap)
