"""What a run of training leaves: a checkpoint in Hugging Face's format, which serves as it is."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from tenfold.base.files import TOKENIZER_FILES, matches
from tenfold.models.family import Model
from tenfold.nn import checkpoint
from tenfold.nn.param import Tree


def export_model(
    output: Path, model: Model, weights: Tree, *, config: Mapping[str, Any], like: Path, dtype: DTypeLike
) -> None:
    """Writes trained weights, with the tokenizer and the settings of generation of the checkpoint they came from.

    All processes of a run call it; one writes.

    Args:
        output: the directory.
        model: the architecture.
        weights: stacked, on any mesh.
        config: what config.json shall say.
        like: where the other files are.
        dtype: of the tensors in the files.
    """
    weights = to_all_hosts(weights)
    if jax.process_index() > 0:
        return
    copy_other_files(like, output)
    generation = like / "generation_config.json"
    checkpoint.export(
        output,
        model.params(stacked=True),
        weights,
        config=config,
        dtype=dtype,
        generation_config=json.loads(generation.read_text(encoding="utf-8")) if generation.exists() else None,
    )


def to_all_hosts(weights: Tree) -> Tree:
    """Weights of which each process can read all; where there are several, in their memory. All of them call it."""
    if jax.process_count() == 1:
        return weights
    return jax.tree.map(lambda w: np.asarray(multihost_utils.process_allgather(w, tiled=True)), weights)


def stored_dtype(config: Mapping[str, Any]) -> jnp.dtype:
    """What a checkpoint's weights are in; float32 where its config does not say."""
    name = config.get("dtype") or config.get("torch_dtype")
    return jnp.dtype(name if name in ("float32", "float16", "bfloat16") else "float32")


def copy_other_files(path: Path, output: Path) -> None:
    """Copies the tokenizer and what says how to generate; the config and the weights are written anew."""
    output.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        if file.is_file() and file.name != "config.json" and matches(file.name, TOKENIZER_FILES):
            shutil.copyfile(file, output / file.name)
