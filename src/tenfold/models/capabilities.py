"""What each architecture can do, by what its family makes of small configurations.

Nothing declares it: a family is asked for everything that configurations ask for, one thing at a time, and what it does
not refuse, it supports.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tenfold.base.errors import TenfoldError
from tenfold.base.gguf_names import NAMINGS
from tenfold.kernels.attention import AttentionSpec
from tenfold.models import FAMILIES
from tenfold.models.family import Model, resolve
from tenfold.nn.cache import CacheSpec, LatentCacheSpec
from tenfold.nn.param import leaves
from tenfold.nn.quantization import SCHEMES
from tenfold.nn.quantized_checkpoint import METHODS
from tenfold.parallel.sharding import DEFAULT_RULES

CACHES: Mapping[str, str] = {
    "full": "the keys and values of every token",
    "window": "those of the last tokens",
    "chunk": "those of the tokens of a chunk",
    "latent": "a latent of every token",
    "recurrent": "a state, and the last inputs of a short convolution",
    "shared": "none of its own: the layer reads that of an earlier one",
}
"""What a layer may hold of the tokens before, by kind."""

_LAYERS = 6  # the longest period of alternating layers
_SMALL: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "num_kv_shared_layers": 0,
    "num_experts": 4,  # and what some families call those, or need besides
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "intermediate_size_mlp": 96,
    "ffn_dim": 96,
    "n_embd": 48,
    "n_head": 4,
    "n_layer": _LAYERS,
    "n_positions": 256,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "mamba_n_heads": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 96,
}
_ASKED: tuple[Mapping[str, Any], ...] = (
    {},
    {"sliding_window": None},
    {
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "no_rope_layers": [1, 0] * (_LAYERS // 2),
    },
    {"layer_types": ["linear_attention"] * (_LAYERS - 1) + ["full_attention"]},
    {"layer_types": ["sliding_attention"] * (_LAYERS - 2) + ["full_attention"] * 2, "num_kv_shared_layers": 1},
)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What one architecture supports.

    Attributes:
        architecture: as `config.json` names it.
        caches: the kinds of its layers, out of `CACHES`.
        experts: whether layers may be mixtures of experts.
        formats: what its weights may be quantised as: rounded when they are loaded, or in a checkpoint.
        axes: of a mesh, those that its weights are split over by the default rules.
    """

    architecture: str
    caches: tuple[str, ...]
    experts: bool
    formats: tuple[str, ...]
    axes: tuple[str, ...]


def survey() -> list[Capabilities]:
    """What every architecture supports, in the order of `FAMILIES`."""
    return [describe(architecture) for architecture in FAMILIES]


def describe(architecture: str) -> Capabilities:
    """What one architecture supports."""
    models = list(_models(architecture))
    axes = {axis for model in models for _, p in leaves(model.params()) for axis in p.axes.split()}
    held = set[str]().union(*map(caches, models))
    split = [getattr(DEFAULT_RULES, axis) for axis in axes]
    named = [name for naming in NAMINGS.values() for name in (naming.architecture, *naming.others)]
    return Capabilities(
        architecture=architecture,
        caches=tuple(kind for kind in CACHES if kind in held),
        experts="experts" in axes,
        formats=(*SCHEMES, *METHODS, *(["gguf"] if architecture in named else [])),
        axes=tuple(sorted({axis for rule in split if rule for axis in ((rule,) if isinstance(rule, str) else rule)})),
    )


def _models(architecture: str) -> Iterator[Model]:
    """The small models of an architecture. Raises TenfoldError if there are none, which `_SMALL` has to mend."""
    model_type = re.sub("For[A-Z].*", "", architecture).lower()
    refused: list[TenfoldError] = []
    for asked in _ASKED:
        try:
            yield resolve({"architectures": [architecture], "model_type": model_type, **_SMALL, **asked})
        except TenfoldError as error:
            refused.append(error)
    if len(refused) == len(_ASKED):
        raise refused[0]


def caches(model: Model) -> set[str]:
    """The kinds of `CACHES` that the layers of a model have."""
    kinds: set[str] = set()
    for held, kind in zip(model.cache_specs(), model.kinds(), strict=True):
        specs = held if isinstance(held, tuple) else (held,)
        kinds |= set(map(_kind, specs))
        if not specs and isinstance(kind, AttentionSpec):
            kinds.add("shared")
    return kinds


def _kind(spec: CacheSpec) -> str:
    if isinstance(spec, LatentCacheSpec):
        return "latent"
    if spec.reach.recurrent:
        return "recurrent"
    return "window" if spec.reach.window is not None else "chunk" if spec.reach.chunk is not None else "full"
