"""A GGUF file as a checkpoint directory in Hugging Face's layout, which is what everything else reads.

Configuration, tokenizer and chat template are written once, from the file's metadata; the weights stay where they are,
and links lead to them.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock

from tenfold.base import gguf, gguf_names
from tenfold.base.errors import TokenizerError
from tenfold.base.files import atomic_directory, find_gguf, gguf_pattern, matches
from tenfold.base.gguf import GGUFFile
from tenfold.base.paths import cache_dir
from tenfold.data.gguf_tokenizer import build_tokenizer, read_end_token_ids


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
    return directory


def _describe(model: GGUFFile, tokenizer: bool) -> dict[str, Any]:
    """What the files beside the weights say, by name."""
    config = gguf_names.read_config(model)
    found: dict[str, Any] = {"config.json": config}
    if tokenizer:
        built = build_tokenizer(model.metadata)
        templates = [{"name": name, "template": source} for name, source in built.chat_templates.items()]
        found["tokenizer_config.json"] = {**built.special_tokens, "chat_template": templates}
        found["tokenizer.json"] = json.loads(built.backend.to_str())
        ends = built.end_token_ids
    else:
        ends = _end_token_ids(model)
    if ends:
        found["generation_config.json"] = {"bos_token_id": config["bos_token_id"], "eos_token_id": list(ends)}
    return found


def _end_token_ids(model: GGUFFile) -> tuple[int, ...]:
    """The tokens that end an answer, if the vocabulary can be read; another one is used, so that it need not be."""
    try:
        return read_end_token_ids(model.metadata)
    except TokenizerError:
        return ()
