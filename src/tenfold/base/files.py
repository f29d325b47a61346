"""The files of a checkpoint: which ones count, and writing them so that nobody sees them half done."""

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from tenfold.base.errors import CheckpointError

TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.jinja",
)
"""Shell patterns of what a tokenizer and its chat template may need at the top level of a checkpoint."""

CHECKPOINT_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
"""All that a checkpoint may need. Nothing pickled, because that can run code."""

SECOND_COPIES = ("consolidated*.safetensors",)
"""The same weights under other names, which Mistral's repositories carry as well."""

_UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")

GGUF_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
"""The name of one of the files that a GGUF model is split into: what they share, its number from 1, and how many."""


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name matches any of some shell patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def gguf_pattern(name: str) -> str:
    """A shell pattern of the GGUF files of one model, given the name of one: that file, or all of a split."""
    split = GGUF_SPLIT.fullmatch(name)
    return glob.escape(name) if split is None else f"{glob.escape(split[1])}-?????-of-{split[3]}.gguf"


def find_gguf(directory: Path) -> list[Path]:
    """The files of the model that a directory has in GGUF; none if it has safetensors or neither.

    Raises CheckpointError if there are several models.
    """
    files = sorted(directory.glob("*.gguf"))
    if not files or any(directory.glob("*.safetensors")):
        return []
    pattern = gguf_pattern(files[0].name)
    others = [file.name for file in files if not fnmatch(file.name, pattern)]
    if others:
        raise CheckpointError(f"{directory} has several GGUF models, {files[0].name} and {others[0]}; pass one file")
    return files


def no_safetensors(where: str, names: Iterable[str]) -> CheckpointError:
    """The error for a checkpoint without safetensors files, with advice that depends on the files that it has."""
    names = sorted(names)
    gguf = [name for name in names if matches(name, ("*.gguf",))]
    if gguf:
        return CheckpointError(
            f"{where} has no *.safetensors file but {_first(gguf)}; of what is not local, directories are read as "
            "safetensors only. Name one GGUF file: in an object store by its URI, or one that is downloaded by its path"
        )
    unsafe = [name for name in names if matches(name, _UNSAFE_WEIGHTS)]
    if not unsafe:
        return CheckpointError(f"{where} has no *.safetensors file: it is not a checkpoint, or its weights are missing")
    return CheckpointError(
        f"{where} has its weights as {_first(unsafe)}; Tenfold reads safetensors and GGUF only, because pickled "
        "weights can run code. Convert them once with transformers, then pass the new directory: "
        f"AutoModelForCausalLM.from_pretrained({where!r}).save_pretrained(DIRECTORY)"
    )


def _first(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


@contextmanager
def atomic_write(path: Path) -> Generator[IO[bytes]]:
    """Opens a file for writing that appears at `path`, whole, when the block ends; never if the block raises."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _share(temporary, 0o666)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: Path, *, replaces: Sequence[str] = (), last: Sequence[str] = ()) -> Generator[Path]:
    """Yields an empty directory whose files move to `path` when the block ends; none of them do if it raises.

    A new `path` appears whole. An existing one is invalid, never mixed, while its files change.

    Args:
        path: where the files are wanted; parents are made.
        replaces: patterns of the files in an existing `path` that make way.
        last: names of files without which `path` is invalid: first to go and last to come, in this order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield staging
        _share(staging, 0o777)
        if path.exists():
            _move_into(path, staging, replaces, last)
        else:
            staging.replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into(path: Path, staging: Path, replaces: Sequence[str], last: Sequence[str]) -> None:
    for name in reversed(last):
        (path / name).unlink(missing_ok=True)
    for old in [entry for entry in path.iterdir() if matches(entry.name, replaces)]:
        old.unlink()
    for new in sorted(staging.iterdir(), key=lambda entry: last.index(entry.name) + 1 if entry.name in last else 0):
        new.replace(path / new.name)


def _share(path: Path, mode: int) -> None:
    """Gives a temporary file, private to its user until now, the permissions of an ordinary new file."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)
