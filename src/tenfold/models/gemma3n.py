"""Gemma 3n, text (Gemma Team, 2025): several states per token, inputs per layer, and late layers that share a cache.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers, H query heads, J key-value heads,
K head dim, E vocabulary of the layers' own inputs, P their width, R rank of LAuReL, N states of a token.

Of a token's N states each layer computes with one, predicts the others from it and corrects all by what came out
(AltUp: Baykal et al., 2023). LAuReL (Menghani et al., 2024) is a residual of low rank. Early layers keep only the
largest activations of their feed-forward. The last layers compute no keys and values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.base.errors import ConfigError
from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.nn import attention, hf_config, rope
from tenfold.nn.attention import head_norm_params, output_params, qkv_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import activation, project, project_all, rotate, times
from tenfold.nn.mlp import mlp_params
from tenfold.nn.multimodal import TOWERS, text_config, text_params
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers

SMALLEST_POWER = 1e-5  # of a state, when it is scaled to another's magnitude


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Gemma 3n checkpoint; letters as in the module's legend.

    Attributes:
        F: of each layer.
        active: the state that layers compute with.
        scaled: whether the corrected state is scaled before it meets the layer's own input.
        sources: for each layer the one whose cache it reads in place of its own, or None.
        sparsity: for each layer the share of its feed-forward's activations that is dropped.
    """

    V: int
    D: int
    F: tuple[int, ...]
    L: int
    H: int
    J: int
    K: int
    E: int
    P: int
    R: int
    N: int
    active: int
    scaled: bool
    rope: Rope
    sliding_rope: Rope
    max_len: int
    windows: tuple[int | None, ...]
    sources: tuple[int | None, ...]
    sparsity: tuple[float, ...]
    final_softcap: float | None
    eps: float = 1e-6
    act: str = "gelu_pytorch_tanh"

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        hf = {"head_dim": 256, **text_config(hf)}
        hf_config.refuse(hf, attention_bias=False, tie_word_embeddings=True, use_bidirectional_attention=False)
        layers = hf_config.require(hf, "num_hidden_layers")
        types = hf_config.read_layer_types(hf, period=5, num_layers=layers)
        widths = hf_config.require(hf, "intermediate_size")
        sparsity = hf.get("activation_sparsity_pattern")
        if sparsity is None:
            sparsity = [0.95 if layers > 10 and i < 10 else 0.0 for i in range(layers)]
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=_each(widths, layers, "intermediate_size"),
            L=layers,
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            E=hf_config.require(hf, "vocab_size_per_layer_input"),
            P=hf_config.require(hf, "hidden_size_per_layer_input"),
            R=hf.get("laurel_rank", 64),
            N=hf.get("altup_num_inputs", 4),
            active=hf.get("altup_active_idx", 0),
            scaled=bool(hf.get("altup_correct_scale", True)),
            rope=hf_config.read_rope(hf, layer_type="full_attention", default_theta=1_000_000.0),
            sliding_rope=hf_config.read_sliding_rope(hf, theta_key="rope_local_base_freq", default_theta=10_000.0),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            windows=hf_config.read_windows(types, hf.get("sliding_window", 512)),
            sources=hf_config.read_cache_sources(types, hf.get("num_kv_shared_layers", 15)),
            sparsity=_each(sparsity, layers, "activation_sparsity_pattern"),
            final_softcap=hf.get("final_logit_softcapping", 30.0),
            eps=float(hf.get("rms_norm_eps", 1e-6)),
            act=hf_config.read_activation(hf, "hidden_activation", default="gelu_pytorch_tanh"),
        )


def _each(given: Any, layers: int, key: str) -> tuple[Any, ...]:
    values = tuple(given) if isinstance(given, list | tuple) else (given,) * layers
    if len(values) != layers:
        raise ConfigError(f"config.json lists {len(values)} values of {key} for {layers} layers")
    return values


@dataclass(frozen=True)
class Kind(AttentionSpec):
    """What tells the layers apart: the window, and with it the rotation; the sparsity; whose cache it reads."""

    sparsity: float = 0.0
    shared: bool = False


def kinds(c: Config) -> tuple[Kind, ...]:
    """What tells the layers apart."""
    return tuple(
        Kind(
            scale=1.0,
            window=window,
            rope="full" if window is None else "sliding",
            sparsity=sparsity,
            shared=source is not None,
        )
        for window, sparsity, source in zip(c.windows, c.sparsity, c.sources, strict=True)
    )


def cache_specs(c: Config) -> tuple[CacheSpec | tuple[CacheSpec, ...], ...]:
    """The cache that each layer needs; none where it reads another's."""
    return tuple(
        KeyValueSpec(c.J, c.K, window) if source is None else ()
        for window, source in zip(c.windows, c.sources, strict=True)
    )


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    wide, at = c.L * c.P, "model"
    own = {
        "own_embed": param((c.E, wide), "vocab embed", f"{at}.embed_tokens_per_layer.weight"),
        "own": _matrix((c.D, wide), "embed mlp", f"{at}.per_layer_model_projection.weight"),
        "own_norm": param((c.P,), "head_dim", f"{at}.per_layer_projection_norm.weight", init="ones"),
    }
    states = {
        name: [_matrix((c.D, c.D), "embed mlp", f"{at}.altup_{hf}.{i}.weight") for i in range(c.N - 1)]
        for name, hf in (("enter", "projections"), ("leave", "unembed_projections"))
    }
    declared = {
        **embedding_params(c.V, c.D, tied=True),
        **own,
        **states,
        "layers": [_layer(c, i) for i in range(c.L)],
        "norm": param((c.D,), "embed", f"{at}.norm.weight", init="ones"),
    }
    return text_params(declared)


def skipped(c: Config) -> tuple[str, ...]:
    """Other modalities, and keys and values of layers that read another's."""
    shared = (i for i, source in enumerate(c.sources) if source is not None)
    return (*TOWERS, *(f"*.layers.{i}.self_attn.{name}.weight" for i in shared for name in ("[kv]_proj", "k_norm")))


def _matrix(shape: tuple[int, int], axes: str, hf: str) -> Param:
    return param(shape, axes, hf, "O I -> I O", inputs=axes.split()[0])


def _layer(c: Config, i: int) -> dict[str, Param]:
    at, D, P, R, N = f"model.layers.{i}", c.D, c.P, c.R, c.N
    heads = {**qkv_params(f"{at}.self_attn", D, c.H, c.J, c.K), **head_norm_params(f"{at}.self_attn", c.K)}

    def norm(name: str) -> Param:
        return param((D,), "embed", f"{at}.{name}.weight", init="ones")

    return {
        "router_norm": norm("altup.router_norm"),
        "router": _matrix((D, N), "embed small", f"{at}.altup.modality_router.weight"),
        "predict": param((N, N, N), "small small small", f"{at}.altup.prediction_coefs.weight", "(B A) M -> B A M"),
        "correct": param((N, N), "small small", f"{at}.altup.correction_coefs.weight"),
        "scale": param((D,), "embed", f"{at}.altup.correct_output_scale", init="zeros"),
        "attn_norm": norm("input_layernorm"),
        "laurel_left": _matrix((D, R), "embed small", f"{at}.laurel.linear_left.weight"),
        "laurel_right": _matrix((R, D), "small embed", f"{at}.laurel.linear_right.weight"),
        "laurel_norm": norm("laurel.post_laurel_norm"),
        **(heads if c.sources[i] is None else {name: heads[name] for name in ("q", "q_norm")}),
        **output_params(f"{at}.self_attn.o_proj", D, c.H, c.K),
        "attn_post_norm": norm("post_attention_layernorm"),
        "mlp_norm": norm("pre_feedforward_layernorm"),
        **mlp_params(f"{at}.mlp", D, c.F[i]),
        "mlp_post_norm": norm("post_feedforward_layernorm"),
        "own_gate": _matrix((D, P), "embed small", f"{at}.per_layer_input_gate.weight"),
        "own_up": _matrix((P, D), "small embed", f"{at}.per_layer_projection.weight"),
        "own_post_norm": norm("post_per_layer_input_norm"),
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
    ropes = {"full": c.rope, "sliding": c.sliding_rope}
    angles = {name: rope.cos_sin(ropes[name], positions, c.max_len) for name in ropes}

    def block(carried: Any, w: Tree, spec: Kind, cache: Any) -> tuple[Any, Any]:
        states_NTD, own_TLP, layer = carried
        states_NTD = _predict(c, states_NTD, w)
        active = states_NTD[c.active]
        x = _norm(c, active, w["attn_norm"])
        laurel = x + _norm(c, project(project(x, w["laurel_left"]), w["laurel_right"]), w["laurel_norm"])
        o, cache = attend(_heads(c, x, w, angles[spec.rope or "full"]), cache, spec)
        x = active + _norm(c, attention.output(o, w), w["attn_post_norm"])
        x = times(x + laurel, 2**-0.5)
        x = x + _norm(c, _mlp(c, _norm(c, x, w["mlp_norm"]), w, spec.sparsity), w["mlp_post_norm"])
        states_NTD = _correct(c, states_NTD, x, w)
        x = states_NTD[c.active]
        x = x * w["scale"][None] if c.scaled else x
        x = activation(c.act)(project(x, w["own_gate"])) * own_TLP[:, layer]
        x = _norm(c, project(x, w["own_up"]), w["own_post_norm"])
        return (states_NTD.at[1:].add(x[None]), own_TLP, layer + 1), cache

    # Factors are rounded to the weights' dtype, as in training.
    dtype = p["norm"].dtype
    x = embed(p["embed"], tokens, dtype) * jnp.asarray(c.D**0.5, dtype)
    first = (_spread(p, x), _own_inputs(p, c, tokens, x), jnp.int32(0))
    (states_NTD, _, _), caches = run_layers(block, p["layers"], kinds(c), first, caches, sources=c.sources)
    return _norm(c, _gather(p, states_NTD), p["norm"]), caches


def _norm(c: Config, x: jax.Array, weight: jax.Array) -> jax.Array:
    return rms_norm(x, weight, c.eps, offset=0.0)


def _own_inputs(p: Tree, c: Config, tokens: Int[Array, " T"], x: Float[Array, "T D"]) -> Float[Array, "T L P"]:
    """What each layer is told of each token: an embedding of its own, and a projection of the common one."""
    dtype = x.dtype
    known = jnp.where(tokens < c.E, tokens, 0)
    embedded = embed(p["own_embed"], known, dtype) * jnp.asarray(c.P**0.5, dtype)
    projected = (project(x, p["own"]) * jnp.asarray(c.D**-0.5, dtype)).reshape(-1, c.L, c.P)
    summed = _norm(c, projected, p["own_norm"]) + embedded.reshape(-1, c.L, c.P)
    return summed * jnp.asarray(2**-0.5, dtype)


def _spread(p: Tree, x: Float[Array, "T D"]) -> Float[Array, "N T D"]:
    """The states of tokens before the first layer, all of one magnitude."""
    return jnp.stack([x, *(_as_large_as(x, project(x, w)) for w in p["enter"])])


def _gather(p: Tree, states: Float[Array, "N T D"]) -> Float[Array, "T D"]:
    """What the states come to after the last layer."""
    first, *others = states
    return jnp.mean(
        jnp.stack([first, *(_as_large_as(first, project(x, w)) for x, w in zip(others, p["leave"], strict=True))]), 0
    )


def _as_large_as(other: Float[Array, "T D"], x: Float[Array, "T D"]) -> Float[Array, "T D"]:
    power, wanted = (jnp.mean(jnp.square(a.astype(jnp.float32)), axis=-1, keepdims=True) for a in (x, other))
    return (x * jnp.sqrt(wanted) / jnp.sqrt(jnp.maximum(power, SMALLEST_POWER))).astype(x.dtype)


def _route(c: Config, x: Float[Array, "T D"], w: Tree) -> Float[Array, "T N"]:
    routed = project(_norm(c, x, w["router_norm"]) * jnp.asarray(1 / c.D, x.dtype), w["router"])
    return jnp.tanh(routed.astype(jnp.float32)).astype(x.dtype)


def _predict(c: Config, states: Float[Array, "N T D"], w: Tree) -> Float[Array, "N T D"]:
    """Each state after the layer, foreseen as a mixture of all before it."""
    route_TM = _route(c, states[c.active], w)
    mix_TBA = jnp.sum(route_TM[:, None, None, :] * w["predict"][None], axis=-1)
    mixed = [sum(mix_TBA[:, b, a, None] * states[a] for a in range(c.N)) for b in range(c.N)]
    return states + jnp.stack(mixed)


def _correct(c: Config, states: Float[Array, "N T D"], computed: Float[Array, "T D"], w: Tree) -> Float[Array, "N T D"]:
    """The foreseen states, moved by what the computed one differs from what was foreseen of it."""
    gain_TN = jnp.sum(_route(c, computed, w)[:, None, :] * w["correct"][None], axis=-1) + 1
    return states + (computed - states[c.active])[None] * gain_TN.T[:, :, None]


def _heads(c: Config, x: Float[Array, "T D"], w: Tree, cos_sin: tuple[jax.Array, jax.Array]) -> Heads:
    if "k" not in w:
        return Heads(rotate(_norm(c, project(x, w["q"]), w["q_norm"]), *cos_sin), None, None)
    q, k, v = attention.qkv(x, w)
    q, k = (rotate(_norm(c, y, w[name]), *cos_sin) for y, name in ((q, "q_norm"), (k, "k_norm")))
    return Heads(q, k, _norm(c, v, jnp.ones_like(w["k_norm"])))


def _mlp(c: Config, x: Float[Array, "T D"], w: Tree, sparsity: float) -> Float[Array, "T D"]:
    """A gated feed-forward that drops a share of the gates, as if they were normally distributed."""
    gate, up = project_all(x, (w["gate"], None), (w["up"], None))
    if sparsity > 0:
        wide = gate.astype(jnp.float32)
        mean = jnp.mean(wide, axis=-1, keepdims=True)
        deviation = jnp.sqrt(jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True))
        gate = jax.nn.relu(wide - (mean + deviation * NormalDist().inv_cdf(sparsity))).astype(gate.dtype)
    return project(activation(c.act)(gate) * up, w["down"])


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states, soft-capped where the config says so."""
    return unembed(p, x, softcap=c.final_softcap)
