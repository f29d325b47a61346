"""Reading `quantization_config`: how each weight of a quantised Hugging Face checkpoint is stored.

Weights are read exactly as they were rounded. What a checkpoint says about rounding activations or a cache is not used:
how to hold those is for the engine to decide. `QuantizedFormat.notes` has what is left out.

Supported, by `quant_method`: compressed-tensors (its formats int-quantized, pack-quantized, float-quantized and
naive-quantized), gptq, awq (gemm), fp8, and mxfp4. Everything else is refused by name.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tenfold.base.errors import UnsupportedModelError
from tenfold.nn.encodings import (
    AWQ,
    GPTQ,
    MXFP4,
    Blocks,
    Encoding,
    Float8,
    Integers,
    MXFP4Experts,
    PackedIntegers,
    Plain,
)
from tenfold.nn.param import Param
from tenfold.nn.quantization import Grid

CONFIG_KEYS = ("quantization_config", "compression_config")
"""The keys of `config.json` that describe quantised weights; the second is what compressed-tensors wrote first."""

_UNUSED = ("*.input_scale", "*.input_zero_point", "*.output_scale", "*.output_zero_point", "*.activation_scale",
           "*.q_scale", "*.k_scale", "*.v_scale", "*.kv_scale", "*.k_zero_point", "*.v_zero_point")  # fmt: skip
_PLAIN = (Plain(),)

Find = Callable[[str, str], tuple[Encoding, ...]]
"""What may be stored for the weight of a module, given its name and its kind: "Linear", "Embedding" or "head"."""


@dataclass(frozen=True)
class QuantizedFormat:
    """How the weights of one quantised checkpoint are stored.

    Attributes:
        method: as `quant_method` names it.
        find: what may be stored for a weight.
        unused: shell patterns of tensors that no weight needs: scales of activations and of a cache.
        notes: what the config asks for that is not done, in words, for the log.
        fused: what may be stored for the weights of all experts of a layer in one.
    """

    method: str
    find: Find
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fused: tuple[Encoding, ...] = _PLAIN

    def encodings(self, p: Param, name: str) -> tuple[Encoding, ...]:
        """The ways in which the tensor `name` may be stored, the one that the config asks for first."""
        dims = len(p.checkpoint_shape(p.sources[0]))
        if p.experts is not None and p.inputs and dims == 3:
            return self.fused
        if not name.endswith(".weight") or dims != 2:
            return _PLAIN
        axes = p.axes.removeprefix("layers ").split()
        kind = "Linear" if "vocab" not in axes else "Embedding" if axes[0] == "vocab" else "head"
        return self.find(name.removesuffix(".weight"), kind)

    def grid(self, p: Param) -> Grid | None:
        """How finely a weight is held once it is loaded; None for a plain array."""
        if not p.inputs or p.stacked:
            return None
        encoding = self.encodings(p, p.sources[0].name)[0]
        return None if isinstance(encoding, Float8) and p.experts is None else encoding.grid(p.input_size)


def read_format(config: Mapping[str, Any]) -> QuantizedFormat | None:
    """How the weights are stored that a `config.json` describes; None if they are not quantised.

    Raises:
        UnsupportedModelError: if a format, or anything that the config asks for and that changes what a weight is, is
            not implemented; names it.
    """
    given = next((config[key] for key in CONFIG_KEYS if config.get(key)), None)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise _unsupported(f"is {given!r}, not an object")
    method = given.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise _unsupported(f"has quant_method={method!r}; implemented: {', '.join(METHODS)}")
    return METHODS[method](given)


def _unsupported(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the weights are quantised, and config.json's quantization_config {what}. Use a checkpoint of another format, "
        "or one in bfloat16, float16 or float32"
    )


# --- reading values -------------------------------------------------------------------------------------------------


def _refuse(given: Mapping[str, Any], where: str = "", **allowed: Sequence[Any]) -> None:
    """Raises UnsupportedModelError if a key has any value but null and those allowed."""
    for key, values in allowed.items():
        if given.get(key) is not None and given[key] not in values:
            listed = ", ".join(map(repr, values)) or "nothing"
            raise _unsupported(f"has {where}{key}={given[key]!r}; implemented: {listed}")


def _bits(given: Mapping[str, Any], key: str, allowed: Sequence[int], where: str = "") -> int:
    bits = given.get(key)
    if type(bits) is not int or bits not in allowed:
        raise _unsupported(f"has {where}{key}={bits!r}; implemented: {', '.join(map(str, allowed))}")
    return bits


def _size(value: Any, key: str) -> int | None:
    """A number of inputs that share a scale; None for -1, which means all of them."""
    if type(value) is not int or value == 0 or value < -1:
        raise _unsupported(f"has {key}={value!r}, which is neither -1 nor a number of weights")
    return None if value == -1 else value


def _strings(given: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A list of names; null is empty."""
    value = given.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise _unsupported(f"has {key}={value!r}, which is not a list of names")
    return tuple(value or ())


def _objects(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = given.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _unsupported(f"has {key}={value!r}, which is not an object")
    return dict(value or {})


def _pattern(text: str, key: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise _unsupported(f"has {text!r} in {key}, which is not a regular expression ({error})") from None


def _skipped(given: Mapping[str, Any], *keys: str) -> Callable[[str], bool]:
    """Whether a module is in a list of those that are not quantised, by its name or by whole parts of it."""
    patterns = [
        _pattern(item.removeprefix("re:") if item.startswith("re:") else rf"(?:.*\.)?(?:{item})(?:\.|$)", key)
        for key in keys
        for item in _strings(given, key)
    ]
    return lambda module: any(pattern.match(f"{module}.weight") for pattern in patterns)


def _listed(encoding: Encoding, skipped: Callable[[str], bool], module: str, kind: str) -> tuple[Encoding, ...]:
    """What formats store that quantise all linear maps but those in a list, and leave the vocabulary's out unasked.

    Lists are not always complete, so a plain weight is looked for, too.
    """
    if skipped(module) or kind == "Embedding":
        return _PLAIN
    return (Plain(), encoding) if kind == "head" else (encoding, Plain())


# --- compressed-tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """One of compressed-tensors' `config_groups`: the modules that it is for, and how they are stored."""

    targets: tuple[str, ...]
    encodings: tuple[Encoding, ...]


_WEIGHTS = {  # what `weights` may say; observers and the dtypes of calibration change nothing in a file
    "type": ("int", "float"),
    "strategy": ("tensor", "channel", "group", "block"),
    "dynamic": (False,),
    "actorder": (False, "weight", "static", "group", "dynamic"),
    "symmetric": (True, False),
}
_WEIGHTS_IGNORED = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "is_mse")


def _compressed_tensors(given: Mapping[str, Any]) -> QuantizedFormat:
    _refuse(given, quantization_status=("compressed",), transform_config=({},), moe_sparsity_config=({},))
    sparsity = _objects(given, "sparsity_config")
    if sparsity.get("format", "dense") != "dense":
        raise _unsupported(f"has sparsity_config.format={sparsity['format']!r}; implemented: 'dense'")
    groups, notes = [], []
    for name, group in _objects(given, "config_groups").items():
        if not isinstance(group, Mapping):
            raise _unsupported(f"has config_groups.{name}={group!r}, which is not an object")
        groups.append(_group(group, group.get("format") or given.get("format"), name))
        for key in ("input_activations", "output_activations"):
            args = _objects(group, key)
            if args:
                how = "as they come" if args.get("dynamic") else "by scales in the checkpoint"
                notes.append(f"the {args.get('num_bits')}-bit {key.replace('_', ' ')} of {name}, rounded {how}")
    if given.get("kv_cache_scheme"):
        notes.append("a quantised cache (kv_cache_scheme)")
    owners = {target: group for group in groups for target in group.targets}
    targeted, ignored = _matcher(tuple(owners), "targets"), _matcher(_strings(given, "ignore"), "ignore")

    def find(module: str, kind: str) -> tuple[Encoding, ...]:
        targets = targeted(module, kind)
        return owners[targets[0]].encodings if targets and not ignored(module, kind) else _PLAIN

    return QuantizedFormat("compressed-tensors", find, _UNUSED, tuple(notes))


def _group(group: Mapping[str, Any], form: Any, name: str) -> _Group:
    where = f"config_groups.{name}."
    targets, weights = _strings(group, "targets"), _objects(group, "weights")
    unknown = group.keys() - {"targets", "weights", "input_activations", "output_activations", "format"}
    unknown |= weights.keys() - {*_WEIGHTS, *_WEIGHTS_IGNORED, "num_bits", "group_size", "block_structure"}
    if unknown:
        raise _unsupported(f"has {where}{min(unknown)}, which is not known")
    if not weights or form == "dense":
        return _Group(targets, _PLAIN)
    _refuse(weights, f"{where}weights.", **_WEIGHTS)
    floats = weights.get("type", "int") == "float"
    symmetric = weights.get("symmetric", True) is not False
    blocks, ordered = _blocks(weights, where), weights.get("actorder") in ("group", "dynamic")
    if form == "pack-quantized" and not floats:
        bits = _bits(weights, "num_bits", (4, 8), f"{where}weights.")
        return _Group(targets, (PackedIntegers(bits, blocks, symmetric, ordered), Plain()))
    if form in ("int-quantized", "naive-quantized") and not floats:
        _bits(weights, "num_bits", range(2, 9), f"{where}weights.")
        return _Group(targets, (Integers(blocks, symmetric, ordered), Plain()))
    if form in ("float-quantized", "naive-quantized") and floats and symmetric:
        _bits(weights, "num_bits", (8,), f"{where}weights.")
        return _Group(targets, (Float8(blocks), Plain()))
    kind = f"{'' if symmetric else 'asymmetric '}{'float' if floats else 'int'}"
    implemented = "pack-quantized, int-quantized, float-quantized, naive-quantized"
    raise _unsupported(f"has {where}format={form!r} for {kind} weights; implemented: {implemented}")


def _blocks(weights: Mapping[str, Any], where: str) -> Blocks:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "tensor":
        return Blocks(None, None)
    if strategy == "channel":
        return Blocks(1, None)
    if strategy == "group":
        return Blocks(1, _size(size, f"{where}weights.group_size"))
    return _pair(weights.get("block_structure"), f"{where}weights.block_structure")


def _pair(value: Any, key: str) -> Blocks:
    if isinstance(value, str):
        value = [int(side) if side.isdecimal() else 0 for side in value.split("x")]
    if not isinstance(value, list) or len(value) != 2 or not all(type(side) is int and side > 0 for side in value):
        raise _unsupported(f"has {key}={value!r}, which is not a number of rows and one of columns")
    return Blocks(*value)


def _matcher(items: Sequence[str], key: str) -> Callable[[str, str], list[str]]:
    """Which of some targets a module matches, the most specific first: its name, a pattern, or its kind."""
    patterns = {item: _pattern(item[3:], key) for item in items if item.startswith("re:")}

    def match(module: str, kind: str) -> list[str]:
        names = [item for item in sorted(items) if item == module]
        names += [item for item in sorted(patterns) if patterns[item].match(module)]
        return names + [item for item in items if item == ("Embedding" if kind == "Embedding" else "Linear")]

    return match


# --- the others -----------------------------------------------------------------------------------------------------


def _gptq(given: Mapping[str, Any]) -> QuantizedFormat:
    form = {key: str(given[key]).lower() for key in ("checkpoint_format", "format") if given.get(key) is not None}
    _refuse(form, checkpoint_format=("gptq", "gptq_v2"), format=("gptq", "gptq_v2"))
    _refuse(given, pack_dtype=("int32",), is_marlin_format=(False,), rotation=(), adapter=({},), lm_head=(True, False))
    encoding = GPTQ(
        bits=_bits(given, "bits", (4, 8)),
        group=_size(given.get("group_size", 128), "group_size"),
        symmetric=given.get("sym") is True,
        v2=form.get("checkpoint_format", form.get("format")) == "gptq_v2",
        ordered=bool(given.get("desc_act")),
    )
    dynamic = [
        (_pattern(name.removeprefix("-:").removeprefix("+:"), "dynamic"), name.startswith("-:"), override)
        for name, override in _objects(given, "dynamic").items()
    ]
    overridden = [(pattern, None if skip else _override(encoding, change)) for pattern, skip, change in dynamic]
    skipped = _skipped(given, "modules_to_not_convert")

    def find(module: str, kind: str) -> tuple[Encoding, ...]:
        if kind == "head" and not given.get("lm_head"):
            return _PLAIN
        found = next((e for pattern, e in overridden if pattern.match(module)), encoding)
        return _PLAIN if found is None else _listed(found, skipped, module, "Linear" if kind == "head" else kind)

    return QuantizedFormat("gptq", find)


def _override(encoding: GPTQ, given: Any) -> GPTQ:
    """What one of GPTQ's `dynamic` rules makes of the settings for all modules."""
    if not isinstance(given, Mapping):
        raise _unsupported(f"has {given!r} in dynamic, which is not an object")
    if given.get("bits") is not None:
        encoding = replace(encoding, bits=_bits(given, "bits", (4, 8), "dynamic."))
    if given.get("group_size") is not None:
        encoding = replace(encoding, group=_size(given["group_size"], "dynamic.group_size"))
    if given.get("sym") is not None:
        encoding = replace(encoding, symmetric=given["sym"] is True)
    if given.get("desc_act") is not None:
        encoding = replace(encoding, ordered=bool(given["desc_act"]))
    return encoding


def _awq(given: Mapping[str, Any]) -> QuantizedFormat:
    form = {key: str(given[key]).lower() for key in ("version", "format") if given.get(key) is not None}
    _refuse(form, version=("gemm",), format=("gemm",))
    if str(given.get("backend")).lower() == "llm-awq":
        raise _unsupported("has backend='llm-awq', whose layout is not implemented")
    _refuse(given, zero_point=(True,))
    _bits(given, "bits", (4,))
    encoding = AWQ(_size(given.get("group_size", 128), "group_size"))
    return QuantizedFormat("awq", partial(_listed, encoding, _skipped(given, "modules_to_not_convert")))


def _fp8(given: Mapping[str, Any]) -> QuantizedFormat:
    _refuse(
        given,
        fmt=("e4m3", "float8_e4m3fn"),
        scale_fmt=("float", "ue8m0"),
        activation_scheme=("dynamic", "static"),
        expert_dtype=("fp8",),
        is_checkpoint_fp8_serialized=(True,),
        modules_to_convert=([],),
    )
    powers, size = given.get("scale_fmt") == "ue8m0", given.get("weight_block_size")
    if size is not None:
        found = (Float8(_pair(size, "weight_block_size"), "weight_scale_inv", powers),)
    else:  # one scale for a whole weight, under either name
        found = (Float8(Blocks(None, None)), Float8(Blocks(None, None), "weight_scale_inv"))
    skipped = _skipped(given, "modules_to_not_convert", "ignored_layers")

    def find(module: str, kind: str) -> tuple[Encoding, ...]:
        first, *others = _listed(found[0], skipped, module, kind)
        return (first, *found[1:], *others) if others else (first,)

    notes = (f"8-bit activations ({given.get('activation_scheme') or 'dynamic'})",)
    return QuantizedFormat("fp8", find, _UNUSED, notes)


def _mxfp4(given: Mapping[str, Any]) -> QuantizedFormat:
    find = partial(_listed, MXFP4(), _skipped(given, "modules_to_not_convert"))
    return QuantizedFormat("mxfp4", find, fused=(MXFP4Experts(), Plain()))


METHODS: dict[str, Callable[[Mapping[str, Any]], QuantizedFormat]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
}
