"""A GGUF file as a checkpoint directory in Hugging Face's layout, which is what everything else reads.

Configuration, tokenizer, chat template and defaults of sampling are written once, from the file's metadata; the weights
stay where they are, and links lead to them.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import WeakFileLock

from tenfold.base import gguf, gguf_config
from tenfold.base.errors import CheckpointError, TokenizerError
from tenfold.base.files import atomic_directory, find_gguf, gguf_pattern, matches
from tenfold.base.gguf import GGUFFile
from tenfold.base.paths import cache_dir
from tenfold.data.gguf_tokenizer import build_tokenizer, read_end_token_ids

log = logging.getLogger(__name__)

KEPT = 32  # directories; those that were wanted the longest ago are removed

_SAMPLING = "general.sampling."
_SAMPLING_FIELDS = {  # of generation_config.json
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_OTHER_SAMPLERS = ("sequence", "mirostat", "xtc_probability", "penalty_last_n")
_NOTHING = (0, -1, "")  # of them: 0 turns one off, and a penalty over the last -1 tokens is ours, over all


def prepare(path: Path, *, tokenizer: bool = True) -> Path:
    """The directory to read a model from: of a GGUF file, one in the cache, made if need be; other directories as is.

    Args:
        path: a GGUF file, any of a split; or a directory. One that has weights in GGUF and no safetensors counts as
            its file.
        tokenizer: whether the file's own tokenizer is wanted, too.

    Raises:
        CheckpointError: the file cannot be read or is damaged, or a directory has several models.
        UnsupportedModelError: the model's architecture, or what it asks for, is not implemented.
        TokenizerError: the tokenizer is wanted, and damaged or not implemented.
    """
    if path.is_dir():
        files = find_gguf(path)
        if not files:
            return path
    else:
        pattern = gguf_pattern(path.name)
        files = sorted(file for file in path.parent.glob("*.gguf") if matches(file.name, [pattern])) or [path]
    files = [file.absolute() for file in files]
    model = gguf.open(files[0])
    versions = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((version("tenfold"), tokenizer, versions)).encode()).hexdigest()[:16]
    home = cache_dir() / "gguf"
    home.mkdir(parents=True, exist_ok=True)
    directory = home / f"{files[0].stem}-{digest}"
    with WeakFileLock(home / ".lock"):
        if not directory.exists():
            content = _describe(model, tokenizer)
            with atomic_directory(directory) as staging:
                for name, value in content.items():
                    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
                    (staging / name).write_text(text, encoding="utf-8")
                for file in files:
                    (staging / file.name).symlink_to(file)
        now = time.time_ns()  # finer than the clock of the file system
        with contextlib.suppress(PermissionError):  # another user's, in a cache that is shared
            os.utime(directory, ns=(now, now))
        _prune(home)
    lacking = [key for key in _OTHER_SAMPLERS if model.metadata.get(_SAMPLING + key, 0) not in _NOTHING]
    if lacking:
        names = ", ".join(_SAMPLING + key for key in lacking)
        log.warning("%s: %s are not implemented; sampling goes without.", files[0], names)
    return directory


def _prune(home: Path) -> None:
    """Removes the directories past `KEPT`: whoever still needs one has seen so many other files come since."""
    made = [entry for entry in home.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    for old in sorted(made, key=lambda entry: entry.stat().st_mtime_ns, reverse=True)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _describe(model: GGUFFile, tokenizer: bool) -> dict[str, Any]:
    """What the files beside the weights say, by name."""
    config = gguf_config.read_config(model)
    found: dict[str, Any] = {"config.json": config}
    if tokenizer:
        built = build_tokenizer(model.metadata)
        templates = [{"name": name, "template": source} for name, source in built.chat_templates.items()]
        found["tokenizer_config.json"] = {**built.special_tokens, "chat_template": templates}
        found["tokenizer.json"] = json.loads(built.backend.to_str())
        ends = built.end_token_ids
    else:
        ends = _end_token_ids(model)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": list(ends)} if ends else {}
    generation |= _sampling(model)
    if generation:
        found["generation_config.json"] = generation
    return found


def _sampling(model: GGUFFile) -> dict[str, float | int]:
    """What the metadata say of sampling, in the words of generation_config.json."""
    found: dict[str, float | int] = {}
    for name, field in _SAMPLING_FIELDS.items():
        value = model.metadata.get(_SAMPLING + name)
        if value is None:
            continue
        if type(value) not in (int, float) or not np.isfinite(value):
            raise CheckpointError(f"{model.path}: {_SAMPLING}{name} must be a number; it is {value!r}")
        found[field] = float(str(np.float32(value))) if type(value) is float else value  # 0.95, as was meant
    if model.metadata.get(f"{_SAMPLING}penalty_last_n") == 0:  # tokens that the penalty looks back on
        found.pop("repetition_penalty", None)
    return found


def _end_token_ids(model: GGUFFile) -> tuple[int, ...]:
    """The tokens that end an answer, if the vocabulary can be read; another one is used, so that it need not be."""
    try:
        return read_end_token_ids(model.metadata)
    except TokenizerError:
        return ()
