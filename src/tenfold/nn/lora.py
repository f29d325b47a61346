"""Adapters of low rank (LoRA: Hu et al., 2021; DoRA: Liu et al., 2024), declared from a model's own parameters.

An adapted weight is base + scale · a · b, of which a and b are trained. The declaration follows that of the model:
where a dict of parameters has weights that are adapted, there the tree of adapters has an `Adapter` for each tensor of
the checkpoint, under the names of the parameters in it, joined by "+". Parameters that are rows of one tensor (Phi-3's
q, k and v) share its a, because PEFT adapts tensors. The base may be quantised (QLoRA: Dettmers et al., 2023): products
read it, and nothing writes it.

Dims: D inputs, N outputs, r rank.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tenfold.base.errors import ConfigError
from tenfold.kernels.matmul import AdaptedWeight, QuantizedWeight
from tenfold.nn import param
from tenfold.nn.layout import split_layout
from tenfold.nn.param import Param, Source, Tree, is_param

PREFIX = "base_model.model."  # of the names of PEFT's tensors

_ALONE = "weight"  # the name of a weight that stands in a list, not in a dict
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which weights are adapted and how. The fields mean what PEFT's of these names do.

    Attributes:
        r: the rank.
        lora_alpha: what is added is scaled by lora_alpha / r.
        target_modules: names of modules as in the checkpoint, such as "q_proj" or "layers.3.mlp.down_proj"; or one
            regular expression of whole names; None is every linear layer but the head.
        exclude_modules: names, or one regular expression, of modules that are left out.
        use_rslora: scaled by lora_alpha / √r instead (Kalajdzievski, 2023).
        use_dora: each output has a length that is trained too.
        lora_dropout: the share of their inputs that adapters do not see in a step of training.
    """

    r: int = 8
    lora_alpha: float = 16.0
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"the rank r of adapters must be at least 1; it is {self.r}")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout is a share from 0 to below 1; it is {self.lora_dropout}")

    @property
    def scale(self) -> float:
        """What a · b is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Adapter(NamedTuple):
    """Of the weights that one tensor of the checkpoint holds: declarations, arrays, or whatever a tree holds for them.

    Attributes:
        a: [D..., r], shared by the weights.
        b: [r, O...] of each weight by its name.
        magnitude: [O...] of each weight by its name; empty for LoRA.
    """

    a: Any
    b: dict[str, Any]
    magnitude: dict[str, Any]


# --- declaring ------------------------------------------------------------------------------------------------------


def adapter_params(tree: Tree, config: LoraConfig) -> Tree:
    """The declaration of the adapters of a model that `tree` declares, stacked or not.

    Raises ConfigError, naming modules, if nothing is adapted, or something that cannot be.
    """
    refused: list[str] = []
    declared = _declare(tree, config, refused)
    if refused:
        more = f", and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise ConfigError(
            f"target_modules {config.target_modules!r} name what has no adapters here (embeddings, norms, routers and "
            f"the weights of experts): {', '.join(refused[:_SHOWN])}{more}; name linear layers, or exclude these"
        )
    if not jax.tree.leaves(declared, is_leaf=is_param):
        modules = sorted({module.rpartition(".")[2] for p in _linear(tree) for module in _modules(p)})
        raise ConfigError(
            f"target_modules {config.target_modules!r} match no linear layer; this model has {', '.join(modules)}"
        )
    return declared


def _linear(tree: Tree) -> list[Param]:
    return [p for _, p in param.leaves(tree) if adaptable(p)]


def adaptable(p: Param) -> bool:
    """Whether a weight is a linear layer's: what products use, but those of experts, and a tied embedding."""
    leads = p.axes.split()[p.stacked :][: len(p.inputs.split())] == p.inputs.split()
    return bool(p.inputs) and leads and p.experts is None and not p.routes


def is_transposed(p: Param) -> bool:
    """Whether the checkpoint has a linear layer's weight as [inputs, outputs]."""
    layout = p.sources[0].layout
    if layout is None:
        return True
    groups, names = split_layout(layout)
    return set(groups[0]) <= set(names[: len(p.inputs.split())])


def _modules(p: Param) -> tuple[str, ...]:
    """The modules whose weights a parameter holds."""
    return tuple(source.name.removesuffix(".weight") for source in p.sources)


def _named(module: str, names: Sequence[str] | str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def targets(p: Param, config: LoraConfig) -> bool:
    """Whether the configuration asks for adapters of a weight, be it possible or not.

    Raises ConfigError if it asks for those of some stacked layers only.
    """
    names = [source.name for source in p.sources if source.name.endswith(".weight") or p.inputs]
    if not names:
        return False
    if config.target_modules is None:
        chosen = [adaptable(p) and "vocab" not in p.axes.split()] * len(names)
    else:
        chosen = [_named(name.removesuffix(".weight"), config.target_modules) for name in names]
    if config.exclude_modules is not None:
        excluded = [_named(name.removesuffix(".weight"), config.exclude_modules) for name in names]
        chosen = [yes and not no for yes, no in zip(chosen, excluded, strict=True)]
    if any(chosen) and not all(chosen):
        raise ConfigError(
            f"target_modules {config.target_modules!r} name {names[chosen.index(True)]} but not "
            f"{names[chosen.index(False)]}, and both are one stacked array; name all layers, or train unstacked ones"
        )
    return all(chosen)


def unmatched(tree: Tree, config: LoraConfig) -> list[str]:
    """Which of the names in target_modules no weight of a model has; a tied head is no weight of its own."""
    if not isinstance(config.target_modules, tuple):
        return []
    modules = [module for _, p in param.leaves(tree) for module in _modules(p)]
    return [name for name in config.target_modules if not any(_named(module, (name,)) for module in modules)]


def _declare(tree: Tree, config: LoraConfig, refused: list[str]) -> Tree:
    if isinstance(tree, list):
        wrapped = [{_ALONE: item} if is_param(item) else item for item in tree]
        return [_declare(item, config, refused) for item in wrapped]
    groups: dict[str, dict[str, Param]] = {}
    declared: dict[str, Any] = {}
    for name, item in tree.items():
        if not is_param(item):
            declared[name] = _declare(item, config, refused)
        elif targets(item, config):
            if adaptable(item):
                groups.setdefault(item.sources[0].name, {})[name] = item
            else:
                refused.append(_modules(item)[0])
    return declared | {"+".join(group): _adapter(group, config) for group in groups.values()}


def _adapter(group: Mapping[str, Param], config: LoraConfig) -> Adapter:
    first = next(iter(group.values()))
    return Adapter(
        a=_input_factor(first, config.r),
        b={name: _output_factor(p, config.r) for name, p in group.items()},
        magnitude={name: _magnitude(p) for name, p in group.items()} if config.use_dora else {},
    )


def _parts(p: Param) -> tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...], tuple[int, ...]]:
    """The axes and lengths of a weight's inputs, and those of its outputs, without stacked dims."""
    axes, inputs = p.axes.split()[p.stacked :], len(p.inputs.split())
    return tuple(axes[:inputs]), p.source_shape[:inputs], tuple(axes[inputs:]), p.source_shape[inputs:]


def _input_factor(p: Param, r: int) -> Param:
    """a, which PEFT has as [r, D]; drawn with the variance of its own uniform distribution, 1 / 3D."""
    axes, shape, _, _ = _parts(p)
    scale = (3 * math.prod(shape)) ** -0.5
    sources = tuple(_source(s, "lora_A.weight", _factor_layout(p, s, inputs=True), whole=True) for s in p.sources)
    return _factor(p, (*shape, r), (*axes, "small"), sources, scale=scale)


def _output_factor(p: Param, r: int) -> Param:
    """b, which PEFT has as [N, r]; zeros at first."""
    _, _, axes, shape = _parts(p)
    sources = tuple(_source(s, "lora_B.weight", _factor_layout(p, s, inputs=False)) for s in p.sources)
    return _factor(p, (r, *shape), ("small", *axes), sources, init="zeros")


def _magnitude(p: Param) -> Param:
    """The lengths of the outputs, which PEFT has as [N]; `initialize` makes them those of the weight."""
    _, _, axes, shape = _parts(p)
    sources = tuple(_source(s, "lora_magnitude_vector", _magnitude_layout(p, s)) for s in p.sources)
    return _factor(p, shape, axes, sources, init="ones")


def _factor(p: Param, shape: tuple[int, ...], axes: Sequence[str], sources: tuple[Source, ...], **init: Any) -> Param:
    stacked = ("layers",) if p.stacked else ()
    return Param(
        shape=(*p.stack_shape, *shape),
        axes=" ".join((*stacked, *axes)),
        sources=sources,
        stack_dims=p.stack_dims,
        **init,
    )


def _source(source: Source, name: str, layout: str | None, *, whole: bool = False) -> Source:
    """Where PEFT has a tensor of an adapter of the weight that stands at `source`."""
    names = [f"{PREFIX}{at.removesuffix('.weight')}.{name}" for at in (source.name, *source.aliases)]
    rows = None if whole else source.rows
    return Source(name=names[0], layout=layout, rows=rows, aliases=tuple(names[1:]))


def _factor_layout(p: Param, source: Source, *, inputs: bool) -> str:
    """The layout of a factor: the weight's dims on one side of the product, in its checkpoint's order, and the rank."""
    ours, theirs = _sides(p, source, inputs=inputs)
    if inputs:
        return f"rank ({' '.join(theirs)}) -> {' '.join(ours)} rank"
    return f"({' '.join(theirs)}) rank -> rank {' '.join(ours)}"


def _magnitude_layout(p: Param, source: Source) -> str:
    ours, theirs = _sides(p, source, inputs=False)
    return f"({' '.join(theirs)}) -> {' '.join(ours)}"


def _sides(p: Param, source: Source, *, inputs: bool) -> tuple[list[str], list[str]]:
    """The names of the inputs, or else of the outputs, in our order and in the checkpoint's."""
    count = len(p.inputs.split())
    if source.layout is None:
        groups = names = [f"d{i}" for i in range(len(p.source_shape))]
    else:
        nested, names = split_layout(source.layout)
        groups = [name for group in nested for name in group if name != "1"]
    ours = names[:count] if inputs else names[count:]
    return ours, [name for name in groups if name in ours]


# --- using ----------------------------------------------------------------------------------------------------------


def initialize(declared: Tree, base: Tree, key: jax.Array, shardings: Tree = None) -> Tree:
    """New adapters, in float32, with which the model computes what it does without.

    Args:
        declared: of `adapter_params`.
        base: the model's weights, in whose tree the adapters are declared.
        key: of the numbers in a; b is zero, and magnitudes are the lengths of the outputs.
        shardings: a matching pytree of shardings, or None for the default device.
    """
    adapters = _with_lengths(declared, param.initialize(declared, key, jnp.float32, shardings), base)
    return adapters if shardings is None else jax.device_put(adapters, shardings)


def _with_lengths(declared: Tree, adapters: Tree, base: Tree) -> Tree:
    if isinstance(declared, list):
        return [_with_lengths(*items) for items in zip(declared, adapters, base, strict=True)]
    if not isinstance(base, dict):
        base = {_ALONE: base}
    found: dict[str, Any] = {}
    for name, item in declared.items():
        if isinstance(item, Adapter):
            lengths = {of: _output_lengths(p, base[of]) for of, p in item.magnitude.items()}
            found[name] = adapters[name]._replace(magnitude=lengths)
        else:
            found[name] = _with_lengths(item, adapters[name], base[name])
    return found


def _output_lengths(p: Param, weight: jax.Array | QuantizedWeight) -> jax.Array:
    """The length of every output of a weight, whose magnitude `p` declares."""
    whole = weight.dequantize(jnp.float32) if isinstance(weight, QuantizedWeight) else weight.astype(jnp.float32)
    whole = whole.reshape(*p.stack_shape, -1, math.prod(p.source_shape))
    return jnp.linalg.norm(whole, axis=-2).reshape(p.shape)


def dropout_keys(declared: Tree, key: jax.Array) -> Tree:
    """A key for each adapter, and so for each layer: what `adapt` takes to drop inputs.

    Args:
        declared: of `adapter_params`.
        key: that they are made of.
    """
    adapters, structure = jax.tree.flatten(declared, is_leaf=lambda x: isinstance(x, Adapter))
    keys = jax.random.split(key, len(adapters))
    return structure.unflatten(
        [
            jax.random.split(key, adapter.a.stack_shape) if adapter.a.stacked else key
            for adapter, key in zip(adapters, keys, strict=True)
        ]
    )


def adapt(base: Tree, adapters: Tree, config: LoraConfig, keys: Tree = None) -> Tree:
    """The model's weights, those that are adapted as `AdaptedWeight`s: what its forward takes, unchanged.

    Args:
        base: weights; arrays, or `QuantizedWeight`s.
        adapters: arrays in the tree of `adapter_params`.
        config: what they were declared with.
        keys: of `dropout_keys`; None drops nothing.
    """
    if isinstance(base, list):
        keys = [None] * len(base) if keys is None else keys
        return [adapt(weights, item, config, key) for weights, item, key in zip(base, adapters, keys, strict=True)]
    if not isinstance(base, dict):
        return adapt({_ALONE: base}, adapters, config, keys)[_ALONE]
    adapted = dict(base)
    for name, item in adapters.items():
        key = None if keys is None else keys[name]
        if isinstance(item, Adapter):
            adapted |= {of: _adapted(base[of], item, of, config, key) for of in item.b}
        else:
            adapted[name] = adapt(base[name], item, config, key)
    return adapted


def _adapted(weight: Any, adapter: Adapter, name: str, config: LoraConfig, key: jax.Array | None) -> AdaptedWeight:
    return AdaptedWeight(
        base=weight,
        a=adapter.a,
        b=adapter.b[name],
        magnitude=adapter.magnitude.get(name),
        scale=config.scale,
        dropout=config.lora_dropout,
        key=key,
    )


def merged(weight: AdaptedWeight) -> jax.Array:
    """One array that does what an adapted one does, of the base's shape and dtype; computed in float32."""
    base = weight.base
    a = weight.a.reshape(-1, weight.a.shape[-1])
    inputs = a.shape[0]
    _, b = weight.matrices(inputs, jnp.float32)
    whole = base.reshape(inputs, -1).astype(jnp.float32) + weight.scale * jnp.matmul(a.astype(jnp.float32), b)
    if weight.magnitude is not None:
        whole = whole * weight.factors(inputs)
    return whole.reshape(base.shape).astype(base.dtype)
