"""Reading and writing checkpoints in Hugging Face's layout: config.json, generation_config.json and safetensors.

Quantised checkpoints and GGUF files are read, too: see `tenfold.nn.quantized_checkpoint` and `gguf_checkpoint`.
"""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tenfold.base.affine import Affine
from tenfold.base.errors import CheckpointError, ConfigError
from tenfold.base.files import SECOND_COPIES, atomic_directory, find_gguf, matches, no_safetensors
from tenfold.kernels.matmul import QuantizedWeight
from tenfold.nn import compressed_tensors, gguf_checkpoint, quantized_checkpoint, safetensors, transfer
from tenfold.nn.encodings import Expected, Plain
from tenfold.nn.layout import to_checkpoint, to_model
from tenfold.nn.loading import Finish, load_params
from tenfold.nn.param import Param, Source, Tree, is_param
from tenfold.nn.quantization import Quantization, hold
from tenfold.nn.quantized_checkpoint import QuantizedFormat
from tenfold.nn.safetensors import Deferred, SafetensorsFile
from tenfold.nn.stored import Stored

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_IGNORED = ("*.rotary_emb.inv_freq", "*.masked_bias")  # buffers that old exporters saved; computed, never learned
_SHOWN = 5


# --- configuration --------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint's directory.

    Raises:
        CheckpointError: if it is missing or not a JSON object.
        UnsupportedModelError: if it describes weights that are quantised in a way that is not implemented.
    """
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json; pass the directory of a Hugging Face checkpoint")
    config = _read_json(path / "config.json")
    quantized_checkpoint.read_format(config)
    return config


def read_quantization(path: Path) -> Quantization | None:
    """Which weights of a checkpoint will be held in the few bits that they are stored in; None for none.

    Raises CheckpointError and UnsupportedModelError as `load` does.
    """
    if find_gguf(path):
        return gguf_checkpoint.read_format(path)
    return quantized_checkpoint.read_format(read_config(path))


def read_eos_token_ids(path: Path) -> tuple[int, ...]:
    """The tokens that end a sequence: those of `generation_config.json`, or if it names none, of `config.json`.

    Raises:
        ConfigError: if `eos_token_id` is neither an integer nor a list of them.
        CheckpointError: if a file is not a JSON object.
    """
    for name in ("generation_config.json", "config.json"):
        given = _read_json(path / name).get("eos_token_id") if (path / name).exists() else None
        if given is not None:
            ids = given if isinstance(given, list) else [given]
            if not all(type(token) is int for token in ids):
                raise ConfigError(f"{path / name}: eos_token_id must be an integer or a list of them, not {given!r}")
            return tuple(dict.fromkeys(ids))
    return ()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return content


# --- loading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """What one parameter, or one index of a stacked one, takes from a tensor of the checkpoint."""

    leaf: int
    index: int
    param: Param
    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.param.checkpoint_shape(self.source)


def _parts(params: Sequence[Param]) -> dict[str, list[_Part]]:
    """The parts of every tensor that a declaration names, in the order of their rows."""
    found: dict[str, list[_Part]] = {}
    for leaf, param in enumerate(params):
        for index, source in enumerate(param.sources):
            found.setdefault(source.name, []).append(_Part(leaf, index, param, source))
    return {name: sorted(parts, key=lambda part: part.source.rows or (0, 0)) for name, parts in found.items()}


def _whole_shape(parts: Sequence[_Part]) -> tuple[int, ...]:
    """The shape of the tensor that the parts make up."""
    last = parts[-1]
    return last.shape if last.source.rows is None else (last.source.rows[1], *last.shape[1:])


def load(
    path: Path,
    tree: Tree,
    dtype: DTypeLike,
    *,
    shardings: Tree = None,
    finish: Finish | None = None,
    skipped: Sequence[str] = (),
    progress: bool = False,
) -> Tree:
    """The weights of a checkpoint's directory, on their devices.

    One tensor is read at a time, in blocks, and a device is sent only its shard: beyond the weights themselves the host
    needs a few hundred megabytes. The arrays do not depend on the files once this returns.

    A weight that the checkpoint holds as integers with scales comes as a `QuantizedWeight`, unrounded, if products use
    it (`Param.inputs`) and it is neither stacked nor sharded. Other quantised weights, such as fp8 ones, are arrays;
    the host holds the numbers of one parameter at a time.

    Args:
        path: a directory with safetensors, sharded with an index or not; or with one GGUF model.
        tree: the declaration; the arrays come in the same tree.
        dtype: of the arrays, whatever the files hold.
        shardings: a matching pytree of shardings, or None for the default device.
        finish: makes what stands in the tree out of each weight as soon as it is loaded, such as a repacked one.
        skipped: shell patterns of tensors that are not read.
        progress: shows a progress bar.

    Raises:
        CheckpointError: if a file is missing, truncated or damaged, or if a tensor is missing, unexpected, or of the
            wrong shape; names tensors, files, and both shapes. All such tensors are reported at once.
        UnsupportedModelError: if the weights are quantised in a way that is not implemented.
    """
    if find_gguf(path):
        return gguf_checkpoint.load(path, tree, dtype, finish=finish, shardings=shardings, progress=progress)
    form = quantized_checkpoint.read_format(read_config(path)) if (path / "config.json").exists() else None
    files = open_tensors(path)
    ignored = (*_IGNORED, *skipped, *(form.unused if form else ()))
    found = _verify(path, jax.tree.leaves(tree, is_leaf=is_param), files, form, ignored)
    _report(path, files, form)
    scattered = 0

    def read(p: Param, target: Any) -> jax.Array | QuantizedWeight:
        nonlocal scattered
        stored = [found[source.name] for source in p.sources]
        weight = _load_param(p, stored, files, dtype, target)
        scattered += _may_be_quantized(p, target) and stored[0].integers and isinstance(weight, jax.Array)
        return weight

    weights = load_params(tree, dtype, read, shardings=shardings, finish=finish, progress=progress)
    if scattered:
        log.warning(
            "%d quantised weights have scales whose inputs do not stand together (act-order): loaded as %s",
            scattered,
            jnp.dtype(dtype).name,
        )
    return weights


def _report(path: Path, files: Mapping[str, SafetensorsFile], form: QuantizedFormat | None) -> None:
    """Says what a quantised checkpoint asks for that is not done."""
    if form is None:
        return
    unused = [name for name in files if matches(name, form.unused)]
    notes = (*form.notes, *((f"{len(unused)} tensors of scales: {_list(unused)}",) if unused else ()))
    log.info("%s: the weights are quantised (%s), and read as they are", path, form.method)
    if notes:
        log.info("%s: not used, because it says how to round other things than weights: %s", path, "; ".join(notes))


def _may_be_quantized(p: Param, target: Any) -> bool:
    return bool(p.inputs) and not p.stacked and target is None


def _load_param(
    p: Param, stored: Sequence[Stored], files: Mapping[str, SafetensorsFile], dtype: DTypeLike, target: Any
) -> jax.Array | QuantizedWeight:
    tensors = {name: files[name][name] for s in stored for name in s.expected() if name in files}

    def release(view: np.ndarray) -> None:
        for file in {files[name] for name in tensors}:
            file.release(view)

    read: list[Affine | np.ndarray] = []
    for s, source in zip(stored, p.sources, strict=True):
        for name in s.expected().keys() & tensors.keys():
            whole = source.rows is None or not isinstance(s.encoding, Plain)
            files[name].will_need(tensors[name] if whole else tensors[name][slice(*source.rows or ())])
        read.append(s.read(tensors, source.rows, dtype))
    weight = hold(p, read) if _may_be_quantized(p, target) else None
    if weight is None:
        arrays = [s.numbers(rows, dtype) for s, rows in zip(stored, read, strict=True)]
        parts = [to_model(a, s.layout, p.source_shape) for a, s in zip(arrays, p.sources, strict=True)]
        weight = transfer.place(parts, dtype, stack_shape=p.stack_shape, sharding=target, release=release)
    for name in {name for s in stored if not isinstance(s.encoding, Plain) for name in s.expected()} & tensors.keys():
        release(tensors[name])
    return weight


def open_tensors(path: Path) -> dict[str, SafetensorsFile]:
    """The file of every tensor in a directory. Raises CheckpointError as `load`."""
    weight_map = _read_index(path)
    opened = [safetensors.open(file) for file in _weight_files(path, weight_map)]
    found: dict[str, SafetensorsFile] = {}
    for file in opened:
        for name in file:
            if name in found:
                raise CheckpointError(f"the tensor {name} is in both {found[name].path} and {file.path}; remove one")
            found[name] = file
    for name, file_name in weight_map.items():
        if name not in found or found[name].path.name != file_name:
            raise CheckpointError(f"{path / INDEX} says that {file_name} holds the tensor {name}, which it does not")
    return found


def _read_index(path: Path) -> dict[str, str]:
    """File names by tensor; empty for a checkpoint without an index."""
    if not (path / INDEX).exists():
        return {}
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{path / INDEX} must map tensors to files beside it, not to {file_name!r}")
    return weight_map


def _weight_files(path: Path, weight_map: Mapping[str, str]) -> list[Path]:
    if weight_map:
        files = [path / name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise CheckpointError(
                f"{path} lacks {_list(absent)}, of the {len(files)} weight files that its index names; download again"
            )
        return files
    if (path / SINGLE).exists():
        return [path / SINGLE]
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise no_safetensors(str(path), [entry.name for entry in path.iterdir()])
    return [file for file in files if not matches(file.name, SECOND_COPIES)] or files


def _verify(
    path: Path,
    params: Sequence[Param],
    files: Mapping[str, SafetensorsFile],
    form: QuantizedFormat | None,
    ignored: Sequence[str],
) -> dict[str, Stored]:
    """How the checkpoint has each parameter that the declaration names.

    Raises CheckpointError with all that does not match.
    """
    parts = _parts(params)
    found = {name: _find(shared, files, form) for name, shared in parts.items()}
    expected = [(name, tensor) for stored in found.values() for name, tensor in stored.expected().items()]
    missing = [name for name, tensor in expected if not tensor.optional and name not in files]
    aliases = {alias for shared in parts.values() for part in shared for alias in part.source.aliases}
    known = {*parts, *aliases, *(name for name, _ in expected)}
    unexpected = [
        f"{name} (in {file.path.name})"
        for name, file in files.items()
        if name not in known and not matches(name, ignored)
    ]
    wrong = [
        f"{name} (in {files[name].path.name}) {problem}"
        for name, tensor in expected
        if name in files
        for problem in _mismatch(name, files[name], tensor, declared=name in parts)
    ]
    problems = [
        f"{len(lines)} {what}: {_list(lines)}"
        for what, lines in (("missing", missing), ("unexpected", unexpected), ("of the wrong kind", wrong))
        if lines
    ]
    if problems:
        raise CheckpointError(
            f"the tensors in {path} are not those that its config.json asks for. " + "; ".join(problems)
        )
    return found


def _find(parts: Sequence[_Part], files: Mapping[str, SafetensorsFile], form: QuantizedFormat | None) -> Stored:
    """How the checkpoint has a parameter: the way of which most is there, or if nothing is, what should be."""
    part, shape = parts[0], _whole_shape(parts)
    candidates = [
        Stored(name, shape, encoding)
        for name in (part.source.name, *part.source.aliases)
        for encoding in (form.encodings(part.param, name) if form else (Plain(),))
    ]
    return max(candidates, key=partial(_count_present, files=files))  # the first of several


def _count_present(stored: Stored, files: Mapping[str, SafetensorsFile]) -> int:
    return sum(
        name in files and not tensor.optional and _fits(files[name].infos[name].dtype, tensor)
        for name, tensor in stored.expected().items()
    )


def _fits(dtype: np.dtype, expected: Expected) -> bool:
    return dtype.name in expected.dtypes if expected.dtypes else jnp.issubdtype(dtype, jnp.floating)


def _mismatch(name: str, file: SafetensorsFile, expected: Expected, *, declared: bool) -> Iterable[str]:
    info = file.infos[name]
    shapes = " or ".join(str(list(shape)) for shape in expected.shapes)
    if info.shape not in expected.shapes:
        yield f"has the shape {list(info.shape)} instead of {shapes}"
    if not _fits(info.dtype, expected):
        yield f"is {info.dtype}, not {' or '.join(expected.dtypes) or 'floating-point'}"
    elif expected.zeros and not declared and file[name].astype(np.float32).any():
        yield "is not zero everywhere"


def _list(items: Sequence[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


# --- exporting ------------------------------------------------------------------------------------------------------


def export(
    path: Path,
    tree: Tree,
    arrays: Tree,
    *,
    config: Mapping[str, Any],
    dtype: DTypeLike,
    max_shard_bytes: int = 5 * 10**9,
    generation_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a directory that `load` and `transformers` read; quantised weights as compressed-tensors does.

    The weights, config and generation config of an earlier checkpoint at `path` are replaced; other files, such as a
    tokenizer's, stay. An export that is interrupted leaves no directory, or one without config.json.

    Args:
        path: the directory.
        tree: the declaration.
        arrays: the weights, in the same tree; those that are symmetric about zero may be `QuantizedWeight`s.
        config: what config.json shall say; the dtype is added, and what it says of quantised weights is replaced.
        dtype: of the tensors in the files, and of the scales of quantised weights.
        max_shard_bytes: weights beyond this are split into several files with an index. A larger tensor has its own.
        generation_config: what generation_config.json shall say; None writes none.

    Raises:
        ConfigError: if the config names no architecture.
        CheckpointError: if safetensors cannot hold the dtype, if parameters leave rows of a fused tensor out, or if the
            format cannot hold a quantised weight.
    """
    if not config.get("architectures"):
        raise ConfigError("config has no 'architectures': without it nobody can tell which model to load")
    dtype = np.dtype(dtype)
    params, treedef = jax.tree.flatten(tree, is_leaf=is_param)
    leaves = treedef.flatten_up_to(arrays)
    written = tensors(tree, arrays, dtype)
    shards = _split(written, max_shard_bytes)
    with atomic_directory(
        path, replaces=("*.safetensors", "generation_config.json"), last=(INDEX, "config.json")
    ) as staging:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            safetensors.write(staging / file, shard)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in written.values())
            _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if generation_config is not None:
            _write_json(staging / "generation_config.json", generation_config)
        plain = {key: value for key, value in config.items() if key not in quantized_checkpoint.CONFIG_KEYS}
        plain |= _quantization_config(params, leaves)
        _write_json(staging / "config.json", {**plain, "dtype": dtype.name, "torch_dtype": dtype.name})


def tensors(tree: Tree, arrays: Tree, dtype: DTypeLike) -> dict[str, Deferred]:
    """The tensors of a checkpoint by name, each put together when it is written. Arguments and errors as `export`."""
    params, treedef = jax.tree.flatten(tree, is_leaf=is_param)
    leaves = treedef.flatten_up_to(arrays)
    found: dict[str, Deferred] = {}
    for name, parts in _parts(params).items():
        found |= _tensors(name, parts, leaves, np.dtype(dtype))
    return found


def _quantization_config(params: Sequence[Param], leaves: Sequence[Any]) -> dict[str, Any]:
    """What config.json says of quantised weights; nothing if there are none."""
    quantized: dict[str, QuantizedWeight] = {}
    plain: list[str] = []
    for p, leaf in zip(params, leaves, strict=True):
        names = [name for source in p.sources for name in (source.name, *source.aliases)]
        modules = [name.removesuffix(".weight") for name in names]
        if isinstance(leaf, QuantizedWeight):
            one = jax.tree.map(lambda array, first=(0,) * p.stack_dims: array[first], leaf)
            quantized |= {source.name.removesuffix(".weight"): one for source in p.sources}
        elif p.inputs:
            plain += modules
    return {"quantization_config": compressed_tensors.describe(quantized, plain)} if quantized else {}


def _tensors(name: str, parts: Sequence[_Part], leaves: Sequence[Any], dtype: np.dtype) -> dict[str, Deferred]:
    """The tensors of one weight of the checkpoint, put together out of its parameters when they are written."""
    spans = [part.source.rows or (0, 0) for part in parts]
    if [start for start, _ in spans] != [0, *(stop for _, stop in spans[:-1])]:
        raise CheckpointError(f"{name}: the rows declared for it, {spans}, leave some out or overlap")
    quantized = [_at(leaf, part) for part in parts if isinstance(leaf := leaves[part.leaf], QuantizedWeight)]
    if quantized and len(quantized) < len(parts):
        raise CheckpointError(f"{name}: only some of its parts are quantised; quantise all or none")
    if quantized and any(part.param.experts is not None and not part.param.stack_dims for part in parts):
        raise CheckpointError(f"{name} holds all experts of a layer, which the format has no place for in few bits")
    if quantized:
        return compressed_tensors.pack(name, quantized, dtype)

    def make() -> np.ndarray:
        values = [to_checkpoint(_on_host(leaves[part.leaf], part), part.source.layout) for part in parts]
        return np.concatenate([value.astype(dtype) for value in values]) if len(parts) > 1 else values[0].astype(dtype)

    return {name: Deferred(dtype, _whole_shape(parts), make)}


def _at(leaf: Any, part: _Part) -> Any:
    """The part's own of what may be stacked: an array, or a quantised weight."""
    if not part.param.stack_dims:
        return leaf
    index = tuple(map(int, np.unravel_index(part.index, part.param.stack_shape)))
    return jax.tree.map(lambda array: array[index], leaf)


def _on_host(array: jax.Array, part: _Part) -> np.ndarray:
    """One part's weight. A copy, because an array whose own value is read keeps it in host memory."""
    return np.asarray(_at(array, part) if part.param.stack_dims else jnp.copy(array))


def _split(tensors: Mapping[str, Deferred], max_bytes: int) -> list[dict[str, Deferred]]:
    shards: list[dict[str, Deferred]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
