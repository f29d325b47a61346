"""Qwen 3.5, text (Qwen Team, 2026): three layers of Gated DeltaNet to one of attention, whose output is gated.

Dims: T packed tokens, V vocabulary, D width, F feed-forward width, L layers; of attention H query heads, J key-value
heads, K head dim, E experts (0 for a dense model), W width of an expert, S of the shared one.

Checkpoints have a vision tower too, which is not read; text alone has one position for all three of its rotations, so
that they are one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads
from tenfold.kernels.norm import rms_norm
from tenfold.kernels.recurrence import RecurrenceSpec
from tenfold.nn import attention, hf_config, moe, rope
from tenfold.nn.attention import attention_params, head_norm_params
from tenfold.nn.cache import CacheSpec, KeyValueSpec
from tenfold.nn.delta_net import DeltaNetSizes, Projected, delta_net, delta_net_params
from tenfold.nn.embedding import embed, embedding_params, unembed
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.layers import project_all, rotate
from tenfold.nn.mlp import mlp_params
from tenfold.nn.moe import Router
from tenfold.nn.multimodal import text_config
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.rope import Rope
from tenfold.nn.stack import run_layers


@dataclass(frozen=True, kw_only=True)
class Config:
    """The architecture of one Qwen 3.5 checkpoint; letters as in the module's legend; `prefix` of tensors' names."""

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    K: int
    rope: Rope
    max_len: int
    recurrent: tuple[bool, ...]
    delta: DeltaNetSizes
    prefix: str
    E: int
    W: int
    S: int
    router: Router
    eps: float = 1e-6
    act: str = "silu"
    attention_bias: bool = False
    tied: bool = False

    @classmethod
    def from_hf(cls, hf: HFConfig) -> "Config":
        """Reads `config.json`. Raises ConfigError or UnsupportedModelError, naming the key."""
        prefix = "model.language_model" if hf.get("text_config") else "model"
        mixtures = "moe" in f"{hf.get('model_type')} {text_config(hf).get('model_type')}"
        hf = {"head_dim": 256, "partial_rotary_factor": 0.25, **text_config(hf)}
        hf_config.refuse(hf, attn_output_gate=True)
        layers = hf_config.require(hf, "num_hidden_layers")
        experts = hf.get("num_experts", 256) if mixtures else 0
        every = hf.get("full_attention_interval", 4)
        types = hf_config.read_hybrid_types(hf, layers)
        if types is None:
            types = tuple("linear_attention" if (i + 1) % every else "full_attention" for i in range(layers))
        return cls(
            V=hf_config.require(hf, "vocab_size"),
            D=hf_config.require(hf, "hidden_size"),
            F=0 if experts else hf_config.require(hf, "intermediate_size"),
            L=layers,
            H=hf_config.require(hf, "num_attention_heads"),
            J=hf_config.kv_heads(hf),
            K=hf_config.head_dim(hf),
            rope=hf_config.read_rope(hf),
            max_len=hf_config.require(hf, "max_position_embeddings"),
            recurrent=tuple(kind == "linear_attention" for kind in types),
            delta=DeltaNetSizes.from_hf(hf),
            prefix=prefix,
            E=experts,
            W=hf.get("moe_intermediate_size", 512),
            S=hf.get("shared_expert_intermediate_size", 512),
            router=Router(top_k=hf_config.read_top_k(hf, experts, default=8) if experts else 0),
            eps=float(hf.get("rms_norm_eps", 1e-6)),
            act=hf_config.read_activation(hf),
            attention_bias=bool(hf.get("attention_bias", False)),
            tied=bool(hf.get("tie_word_embeddings", False)),
        )


def kinds(c: Config) -> tuple[AttentionSpec | RecurrenceSpec, ...]:
    """What tells the layers apart: whether they attend."""
    return tuple(RecurrenceSpec() if recurrent else AttentionSpec(scale=c.K**-0.5) for recurrent in c.recurrent)


def cache_specs(c: Config) -> tuple[CacheSpec | tuple[CacheSpec, ...], ...]:
    """The caches that each layer needs."""
    return tuple(c.delta.caches if recurrent else KeyValueSpec(c.J, c.K) for recurrent in c.recurrent)


def params(c: Config) -> Tree:
    """The declaration of every weight, unstacked."""
    return {
        **embedding_params(c.V, c.D, tied=c.tied, prefix=c.prefix),
        "layers": [_layer(c, f"{c.prefix}.layers.{i}", recurrent) for i, recurrent in enumerate(c.recurrent)],
        "norm": param((c.D,), "embed", f"{c.prefix}.norm.weight", init="zeros"),
    }


def _layer(c: Config, at: str, recurrent: bool) -> Tree:
    return {
        "mixer_norm": param((c.D,), "embed", f"{at}.input_layernorm.weight", init="zeros"),
        **(_recurrent(c, f"{at}.linear_attn") if recurrent else _attention(c, f"{at}.self_attn")),
        "mlp_norm": param((c.D,), "embed", f"{at}.post_attention_layernorm.weight", init="zeros"),
        **(_experts(c, f"{at}.mlp") if c.E else mlp_params(f"{at}.mlp", c.D, c.F)),
    }


def _experts(c: Config, at: str) -> Tree:
    if c.prefix == "model":  # text alone, which transformers writes expert by expert
        experts = moe.expert_params(f"{at}.experts", c.D, c.W, c.E)
    else:
        gate_up, down = f"{at}.experts.gate_up_proj", f"{at}.experts.down_proj"
        layout = "E (two F) D -> E D two F"
        experts = {
            "gate_up": param((c.E, c.D, 2, c.W), "experts embed gates mlp", gate_up, layout, inputs="embed"),
            "down": param((c.E, c.W, c.D), "experts mlp embed", down, "E D F -> E F D", inputs="mlp"),
        }
    return {
        **moe.router_params(f"{at}.gate", c.D, c.E),
        **experts,
        "shared": mlp_params(f"{at}.shared_expert", c.D, c.S),
        "shared_gate": moe.shared_gate_param(f"{at}.shared_expert_gate", c.D),
    }


def skipped(c: Config) -> tuple[str, ...]:
    """The vision tower, and a layer beside the others, which predicts tokens further ahead."""
    return ("model.visual.*", "mtp.*")


def _attention(c: Config, at: str) -> dict[str, Param]:
    declared = attention_params(at, c.D, c.H, c.J, c.K, qkv_bias=c.attention_bias, o_bias=c.attention_bias)
    # Each head's query is followed by what gates its output.
    axes, hf = "heads head_dim", f"{at}.q_proj"
    declared["q"] = param((c.D, c.H, 2 * c.K), f"embed {axes}", f"{hf}.weight", "(H K) D -> D H K", inputs="embed")
    if c.attention_bias:
        declared["q_bias"] = param((c.H, 2 * c.K), axes, f"{hf}.bias", "(H K) -> H K", init="zeros")
    return declared | head_norm_params(at, c.K, init="zeros")


def _recurrent(c: Config, at: str) -> dict[str, Param]:
    z = (c.D, c.delta.H, c.delta.V)
    return {
        "qkv": param((c.D, c.delta.channels), "embed mlp", f"{at}.in_proj_qkv.weight", "C D -> D C", inputs="embed"),
        "z": param(z, "embed heads head_dim", f"{at}.in_proj_z.weight", "(H V) D -> D H V", inputs="embed"),
        "b": param((c.D, c.delta.H), "embed heads", f"{at}.in_proj_b.weight", "H D -> D H", inputs="embed"),
        "a": param((c.D, c.delta.H), "embed heads", f"{at}.in_proj_a.weight", "H D -> D H", inputs="embed"),
        **delta_net_params(at, c.delta),
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

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return rms_norm(x, weight, c.eps, offset=1.0)

    def attended(x: jax.Array, w: Tree, spec: AttentionSpec, cache: Any) -> tuple[jax.Array, Any]:
        q, k, v = attention.qkv(x, w)
        q, gate = jnp.split(q, 2, axis=-1)
        q, k = norm(q, w["q_norm"]), norm(k, w["k_norm"])
        o, cache = attend(Heads(rotate(q, *cos_sin), rotate(k, *cos_sin), v), cache, spec)
        return attention.output(o * jax.nn.sigmoid(gate), w), cache

    def recurred(x: jax.Array, w: Tree, cache: Any) -> tuple[jax.Array, Any]:
        projected = Projected(*project_all(x, *((w[name], None) for name in Projected._fields)))
        return delta_net(projected, w, c.delta, attend, cache)

    def block(x: jax.Array, w: Tree, kind: AttentionSpec | RecurrenceSpec, cache: Any) -> tuple[jax.Array, Any]:
        h = norm(x, w["mixer_norm"])
        o, cache = recurred(h, w, cache) if isinstance(kind, RecurrenceSpec) else attended(h, w, kind, cache)
        x = x + o
        return x + moe.feed_forward(norm(x, w["mlp_norm"]), w, c.router, c.act), cache

    x, caches = run_layers(block, p["layers"], kinds(c), embed(p["embed"], tokens, p["norm"].dtype), caches)
    return norm(x, p["norm"]), caches


def logits(p: Tree, c: Config, x: Float[Array, "S D"]) -> Float[Array, "S V"]:
    """Float32 logits of hidden states."""
    return unembed(p, x)
