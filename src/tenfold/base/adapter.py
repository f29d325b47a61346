"""The directory of an adapter in PEFT's layout: adapter_config.json beside adapter_model.safetensors."""

import json
from pathlib import Path
from typing import Any, NamedTuple, cast

from tenfold.base.builtin import BUILTIN_MODEL, builtin_model
from tenfold.base.errors import CheckpointError
from tenfold.base.storage import fetch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
"""What an adapter consists of, besides a tokenizer that may stand beside it."""


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter, and no model of its own."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def read_adapter_config(path: Path) -> dict[str, Any]:
    """What adapter_config.json says.

    Raises CheckpointError if it is missing or not a JSON object.
    """
    file = path / ADAPTER_CONFIG
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return cast("dict[str, Any]", content)


def fetch_base(path: Path, *, progress: bool = False) -> Path:
    """The directory of the model that an adapter belongs to, downloaded if need be.

    `base_model_name_or_path` says which: a directory, a Hugging Face id or a URI, as for `storage.fetch`; or the name
    of the built-in model.

    Raises:
        CheckpointError: if adapter_config.json is damaged or names no base, or the base cannot be fetched.
    """
    name = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise CheckpointError(f"{path / ADAPTER_CONFIG} names no base_model_name_or_path; write the base model into it")
    return builtin_model() if name == BUILTIN_MODEL else fetch(name, progress=progress)


class Beside(NamedTuple):
    """Where the files are that say what a model is and how it reads text."""

    model: Path
    tokenizer: Path


def base_files(path: Path, *, progress: bool = False) -> Beside:
    """Where the configuration and the tokenizer of a checkpoint are: of an adapter's directory, at its base, but for a
    tokenizer that stands beside the adapter.

    Raises CheckpointError as `fetch_base`.
    """
    if not is_adapter(path):
        return Beside(path, path)
    base = fetch_base(path, progress=progress)
    return Beside(base, path if (path / "tokenizer.json").is_file() else base)


def name_of_base(path: Path) -> str:
    """How adapter_config.json names the base in a directory, so that `fetch_base` finds it again."""
    return BUILTIN_MODEL if path == builtin_model() else str(path)
