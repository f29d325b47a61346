"""Reading and writing checkpoints in Hugging Face's layout: config.json, generation_config.json and safetensors."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tenfold.base.errors import CheckpointError, ConfigError, UnsupportedModelError
from tenfold.base.files import SECOND_COPIES, atomic_directory, matches, no_safetensors
from tenfold.nn import safetensors, transfer
from tenfold.nn.layout import to_checkpoint, to_model
from tenfold.nn.param import Param, Source, Tree, is_param
from tenfold.nn.safetensors import Deferred, SafetensorsFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_IGNORED = ("*.rotary_emb.inv_freq", "*.masked_bias")  # buffers that old exporters saved; computed, never learned
_SHOWN = 5


# --- configuration --------------------------------------------------------------------------------------------------


def read_config(path: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint's directory.

    Raises:
        CheckpointError: if it is missing or not a JSON object.
        UnsupportedModelError: if it describes quantised weights.
    """
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json; pass the directory of a Hugging Face checkpoint")
    config = _read_json(path / "config.json")
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else quantization
        raise UnsupportedModelError(
            f"{path / 'config.json'}: the weights are quantised ({method}), which is not implemented; "
            "use the checkpoint in bfloat16, float16 or float32"
        )
    return config


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
    """What one parameter, or one layer of a stacked one, takes from a tensor of the checkpoint."""

    leaf: int
    layer: int
    param: Param
    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.param.checkpoint_shape(self.source)


def _parts(params: Sequence[Param]) -> dict[str, list[_Part]]:
    """The parts of every tensor that a declaration names, in the order of their rows."""
    found: dict[str, list[_Part]] = {}
    for leaf, param in enumerate(params):
        for layer, source in enumerate(param.sources):
            found.setdefault(source.name, []).append(_Part(leaf, layer, param, source))
    return {name: sorted(parts, key=lambda part: part.source.rows or (0, 0)) for name, parts in found.items()}


def _whole_shape(parts: Sequence[_Part]) -> tuple[int, ...]:
    """The shape of the tensor that the parts make up."""
    last = parts[-1]
    return last.shape if last.source.rows is None else (last.source.rows[1], *last.shape[1:])


def load(path: Path, tree: Tree, dtype: DTypeLike, *, shardings: Tree = None, progress: bool = False) -> Tree:
    """The weights of a checkpoint's directory, on their devices.

    One tensor is read at a time, in blocks, and a device is sent only its shard: beyond the weights themselves the host
    needs a few hundred megabytes. The arrays do not depend on the files once this returns.

    Args:
        path: a directory with safetensors, sharded with an index or not.
        tree: the declaration; the arrays come in the same tree.
        dtype: of the arrays, whatever the files hold.
        shardings: a matching pytree of shardings, or None for the default device.
        progress: shows a progress bar.

    Raises:
        CheckpointError: if a file is missing, truncated or damaged, or if a tensor is missing, unexpected, or of the
            wrong shape; names tensors, files, and both shapes. All such tensors are reported at once.
        UnsupportedModelError: if the weights are quantised.
    """
    if (path / "config.json").exists():
        read_config(path)
    params, treedef = jax.tree.flatten(tree, is_leaf=is_param)
    files = _open(path)
    names = _verify(path, params, files)
    targets = [None] * len(params) if shardings is None else treedef.flatten_up_to(shardings)
    columns = (TextColumn("Loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    arrays: list[jax.Array] = []
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("", total=sum(math.prod(p.shape) for p in params) * jnp.dtype(dtype).itemsize)
        for p, target in zip(params, targets, strict=True):
            arrays.append(_load_param(p, [files[names[source.name]] for source in p.sources], names, dtype, target))
            bar.advance(task, arrays[-1].nbytes)
    return treedef.unflatten(arrays)


def _load_param(
    p: Param, files: Sequence[SafetensorsFile], names: Mapping[str, str], dtype: DTypeLike, target: Any
) -> jax.Array:
    layers: list[np.ndarray] = []
    for source, file in zip(p.sources, files, strict=True):
        tensor = file[names[source.name]]
        rows = tensor if source.rows is None else tensor[slice(*source.rows)]
        file.will_need(rows)
        layers.append(to_model(rows, source.layout, p.layer_shape))

    def release(view: np.ndarray) -> None:
        for file in set(files):
            file.release(view)

    return transfer.place(layers, dtype, stacked=p.stacked, sharding=target, release=release)


def _open(path: Path) -> dict[str, SafetensorsFile]:
    """The file of every tensor in a directory."""
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


def _verify(path: Path, params: Sequence[Param], files: Mapping[str, SafetensorsFile]) -> dict[str, str]:
    """Under which name the checkpoint has each tensor that the declaration names.

    Raises CheckpointError with all that does not match.
    """
    parts = _parts(params)
    names = {name: _present(shared, files) for name, shared in parts.items()}
    missing = [name for name, present in names.items() if present is None]
    aliases = {alias for shared in parts.values() for part in shared for alias in part.source.aliases}
    unexpected = [
        f"{name} (in {file.path.name})"
        for name, file in files.items()
        if name not in parts and name not in aliases and not matches(name, _IGNORED)
    ]
    wrong = [
        problem
        for name, present in names.items()
        if present is not None
        for problem in _mismatch(present, files[present], _whole_shape(parts[name]))
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
    return {name: present for name, present in names.items() if present is not None}


def _present(parts: Sequence[_Part], files: Mapping[str, SafetensorsFile]) -> str | None:
    source = parts[0].source
    return next((name for name in (source.name, *source.aliases) if name in files), None)


def _mismatch(name: str, file: SafetensorsFile, expected: tuple[int, ...]) -> Iterable[str]:
    info = file.infos[name]
    if info.shape != expected:
        yield f"{name} (in {file.path.name}) has the shape {list(info.shape)} instead of {list(expected)}"
    if not jnp.issubdtype(info.dtype, jnp.floating):
        yield f"{name} (in {file.path.name}) is {info.dtype}, not floating-point"


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
    """Writes a directory that `load` and `transformers` read.

    The weights, config and generation config of an earlier checkpoint at `path` are replaced; other files, such as a
    tokenizer's, stay. An export that is interrupted leaves no directory, or one without config.json.

    Args:
        path: the directory.
        tree: the declaration.
        arrays: the weights, in the same tree.
        config: what config.json shall say; the dtype is added.
        dtype: of the tensors in the files.
        max_shard_bytes: weights beyond this are split into several files with an index. A larger tensor has its own.
        generation_config: what generation_config.json shall say; None writes none.

    Raises:
        ConfigError: if the config names no architecture.
        CheckpointError: if safetensors cannot hold the dtype, or parameters leave rows of a fused tensor out.
    """
    if not config.get("architectures"):
        raise ConfigError("config has no 'architectures': without it nobody can tell which model to load")
    dtype = np.dtype(dtype)
    params, treedef = jax.tree.flatten(tree, is_leaf=is_param)
    leaves = treedef.flatten_up_to(arrays)
    tensors = {name: _deferred(name, parts, leaves, dtype) for name, parts in _parts(params).items()}
    shards = _split(tensors, max_shard_bytes)
    with atomic_directory(
        path, replaces=("*.safetensors", "generation_config.json"), last=(INDEX, "config.json")
    ) as staging:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
            safetensors.write(staging / file, shard)
            weight_map |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        if generation_config is not None:
            _write_json(staging / "generation_config.json", generation_config)
        _write_json(staging / "config.json", {**config, "dtype": dtype.name, "torch_dtype": dtype.name})


def _deferred(name: str, parts: Sequence[_Part], leaves: Sequence[jax.Array], dtype: np.dtype) -> Deferred:
    """A tensor of the checkpoint, put together out of its parameters when it is written."""
    spans = [part.source.rows or (0, 0) for part in parts]
    if [start for start, _ in spans] != [0, *(stop for _, stop in spans[:-1])]:
        raise CheckpointError(f"{name}: the rows declared for it, {spans}, leave some out or overlap")

    def make() -> np.ndarray:
        values = [to_checkpoint(_on_host(leaves[part.leaf], part), part.source.layout) for part in parts]
        return np.concatenate([value.astype(dtype) for value in values]) if len(parts) > 1 else values[0].astype(dtype)

    return Deferred(dtype, _whole_shape(parts), make)


def _on_host(array: jax.Array, part: _Part) -> np.ndarray:
    """One layer's weight. A copy, because an array whose own value is read keeps it in host memory."""
    return np.asarray(array[part.layer] if part.param.stacked else jnp.copy(array))


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
