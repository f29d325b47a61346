"""Adapters on disk, in PEFT's layout, and checkpoints that they are merged into."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tenfold.base.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter_config
from tenfold.base.errors import CheckpointError, ConfigError, UnsupportedModelError
from tenfold.base.files import CHECKPOINT_FILES, atomic_directory, find_gguf, matches
from tenfold.kernels.matmul import AdaptedWeight, QuantizedWeight
from tenfold.nn import checkpoint, safetensors
from tenfold.nn.layout import to_checkpoint, to_model
from tenfold.nn.loading import Finish
from tenfold.nn.lora import LoraConfig, adapt, adapter_params, is_transposed, merged, targets
from tenfold.nn.param import Param, Source, Tree, is_param, leaves, map_params
from tenfold.nn.safetensors import Deferred, SafetensorsFile

# What adapter_config.json may say besides the fields of LoraConfig without changing what an adapter computes.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "fan_in_fan_out",  # the layout of the base's weights, which our declaration knows
        "inference_mode",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
_REQUIRED = {"peft_type": ("LORA",), "bias": ("none", None), "init_lora_weights": (True, False, "gaussian", None)}


def read_config(path: Path) -> LoraConfig:
    """How the adapter in a directory was declared.

    Raises:
        CheckpointError: if adapter_config.json is missing or damaged.
        UnsupportedModelError: if it asks for what is not implemented; names the keys.
    """
    config = read_adapter_config(path)
    known = {"r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "use_dora", "lora_dropout"}
    lacking = [
        f"{key} = {value!r}"
        for key, value in config.items()
        if (key in _REQUIRED and value not in _REQUIRED[key])
        or (key not in known | _WITHOUT_EFFECT | _REQUIRED.keys() and value)
    ]
    if lacking:
        raise UnsupportedModelError(f"{path / ADAPTER_CONFIG} asks for what is not implemented: {', '.join(lacking)}")
    if config.get("target_modules") is None:
        raise UnsupportedModelError(f"{path / ADAPTER_CONFIG} has no target_modules, which say what is adapted")
    try:
        return LoraConfig(
            r=int(config["r"]),
            lora_alpha=float(config["lora_alpha"]),
            target_modules=_names(config["target_modules"]),
            exclude_modules=_names(config.get("exclude_modules")),
            use_rslora=bool(config.get("use_rslora")),
            use_dora=bool(config.get("use_dora")),
            lora_dropout=float(config.get("lora_dropout") or 0.0),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / ADAPTER_CONFIG} is damaged: {error!r}") from None


def _names(given: Any) -> tuple[str, ...] | str | None:
    return None if given in (None, "all-linear") else given if isinstance(given, str) else tuple(given)


def load(path: Path, tree: Tree, *, dtype: DTypeLike = jnp.float32, shardings: Tree = None) -> tuple[LoraConfig, Tree]:
    """The adapter in a directory: its configuration, and its arrays in the tree of `adapter_params`.

    Args:
        path: a directory in PEFT's layout.
        tree: the declaration of the model, stacked or not.
        dtype: of the arrays.
        shardings: a matching pytree of shardings, or None for the default device.

    Raises:
        CheckpointError: if a file is missing or damaged, or tensors are not those that its configuration asks for.
        ConfigError, UnsupportedModelError: if the configuration asks for what the model does not have.
    """
    config = read_config(path)
    return config, checkpoint.load(path, adapter_params(tree, config), dtype, shardings=shardings)


def save(path: Path, tree: Tree, adapters: Tree, config: LoraConfig, *, base: str) -> None:
    """Writes an adapter that PEFT loads; other files at `path` stay.

    Args:
        path: the directory.
        tree: the declaration of the model, stacked or not.
        adapters: arrays in the tree of `adapter_params`; written in their own dtype.
        config: what they were declared with.
        base: what adapter_config.json shall name as the base: a directory, a Hugging Face id or a URI.
    """
    declared = adapter_params(tree, config)
    dtype = jax.tree.leaves(adapters)[0].dtype
    described = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": _transposed(tree, config),
        "inference_mode": True,
        "lora_alpha": int(config.lora_alpha) if config.lora_alpha == int(config.lora_alpha) else config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "peft_type": "LORA",
        "r": config.r,
        "target_modules": _module_names(tree, config),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    with atomic_directory(path, replaces=(ADAPTER_WEIGHTS,), last=(ADAPTER_CONFIG,)) as staging:
        found = checkpoint.tensors(declared, adapters, dtype)
        safetensors.write(staging / ADAPTER_WEIGHTS, dict(sorted(found.items())))
        (staging / ADAPTER_CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _transposed(tree: Tree, config: LoraConfig) -> bool:
    """Whether the checkpoint has the adapted weights as [inputs, outputs] (GPT-2)."""
    return all(is_transposed(p) for _, p in leaves(tree) if targets(p, config))


def _module_names(tree: Tree, config: LoraConfig) -> list[str] | str:
    """The modules that are adapted: by their last names, or where those mean others too, by their whole ones."""
    if isinstance(config.target_modules, str) and config.exclude_modules is None:
        return config.target_modules
    adapted: set[str] = set()
    others: set[str] = set()
    for _, p in leaves(tree):
        found = adapted if targets(p, config) else others
        found.update(source.name.removesuffix(".weight") for source in p.sources)
    last = {module.rpartition(".")[2] for module in adapted}
    ambiguous = last & {module.rpartition(".")[2] for module in others}
    return sorted({m if (name := m.rpartition(".")[2]) in ambiguous else name for m in adapted})


# --- merging --------------------------------------------------------------------------------------------------------


def merge_on_load(path: Path, tree: Tree) -> Finish:
    """What merges the adapter in a directory into each weight of its base that `checkpoint.load` gives it.

    Args:
        path: the adapter's directory.
        tree: the declaration of the model, unstacked.

    Raises CheckpointError, ConfigError and UnsupportedModelError as `load`.
    """
    adapted = _adapted_sources(tree, *load(path, tree))

    def finish(p: Param, weight: jax.Array | QuantizedWeight) -> jax.Array | QuantizedWeight:
        of = adapted.get(_place(p.sources[0]))
        if of is None:
            return weight
        if isinstance(weight, QuantizedWeight):
            raise ConfigError(f"{path} cannot be merged into quantised weights; name their original as its base")
        return _merge(weight, of)

    return finish


def _merge(weight: jax.Array, adapted: AdaptedWeight) -> jax.Array:
    return _merged(replace(adapted, base=weight))


_merged = jax.jit(merged)


def _place(source: Source) -> tuple[str, tuple[int, int] | None]:
    return source.name, source.rows


def _adapted_sources(tree: Tree, config: LoraConfig, adapters: Tree) -> dict[tuple[str, Any], AdaptedWeight]:
    """The adapted weights by where they stand in the checkpoint; each still without its base."""
    names, treedef = jax.tree.flatten(tree, is_leaf=is_param)
    weights = treedef.flatten_up_to(adapt(map_params(lambda _: None, tree), adapters, config))
    pairs = zip(names, weights, strict=True)
    return {_place(p.sources[0]): weight for p, weight in pairs if isinstance(weight, AdaptedWeight)}


def merge(base: Path, adapter: Path, output: Path, tree: Tree) -> None:
    """Writes the checkpoint of a model with an adapter merged into it.

    All files are those of the base, tensor for tensor and in their dtypes, but for the tensors that are adapted. One
    tensor is in memory at a time.

    Args:
        base: the model's directory, with weights that are not quantised.
        adapter: the adapter's.
        output: a directory that does not exist, or is empty.
        tree: the declaration of the model, unstacked.

    Raises:
        ConfigError: if `output` is in use, or the base is quantised.
        CheckpointError, UnsupportedModelError: if a directory cannot be used.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} exists and is not an empty directory; choose another output")
    if find_gguf(base) or checkpoint.read_quantization(base) is not None:
        raise ConfigError(f"the weights of {base} are quantised; merge into the checkpoint that they came from")
    parts: dict[str, list[tuple[Param, AdaptedWeight]]] = {}
    adapted = _adapted_sources(tree, *load(adapter, tree))
    for _, p in leaves(tree):
        if _place(p.sources[0]) in adapted:
            for name in (p.sources[0].name, *p.sources[0].aliases):
                parts.setdefault(name, []).append((p, adapted[_place(p.sources[0])]))
    files = checkpoint.open_tensors(base)
    shards: dict[Path, dict[str, Deferred]] = {}
    for name, file in files.items():
        shards.setdefault(file.path, {})[name] = _deferred(name, file, parts.get(name, ()))
    with atomic_directory(output, last=(checkpoint.INDEX, "config.json")) as staging:
        for file, tensors in shards.items():
            safetensors.write(staging / file.name, tensors)
        for file in base.iterdir():
            if file.is_file() and matches(file.name, CHECKPOINT_FILES) and not file.name.endswith(".safetensors"):
                shutil.copyfile(file, staging / file.name)


def _deferred(name: str, file: SafetensorsFile, parts: Sequence[tuple[Param, AdaptedWeight]]) -> Deferred:
    info = file.infos[name]

    def make() -> np.ndarray:
        whole = np.array(file[name])
        file.release(file[name])
        for p, adapted in parts:
            source = p.sources[0]
            rows = whole[slice(*source.rows or (None,))]
            weight = to_model(rows, source.layout, p.source_shape)
            rows[...] = to_checkpoint(np.asarray(_merge(jnp.asarray(weight), adapted)), source.layout)
        return whole

    return Deferred(info.dtype, info.shape, make)
