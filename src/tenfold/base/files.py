"""The files of a checkpoint: which ones count, and writing them so that nobody sees them half done."""

import os
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

CHECKPOINT_FILES = (*TOKENIZER_FILES, "generation_config.json", "*.safetensors", "*.safetensors.index.json")
"""All that a checkpoint may need. Nothing pickled, because that can run code."""

SECOND_COPIES = ("consolidated*.safetensors",)
"""The same weights under other names, which Mistral's repositories carry as well."""

_UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name matches any of some shell patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def no_safetensors(where: str, names: Iterable[str]) -> CheckpointError:
    """The error for a checkpoint without safetensors files, with advice that depends on the files that it has."""
    unsafe = sorted(name for name in names if matches(name, _UNSAFE_WEIGHTS))
    if not unsafe:
        return CheckpointError(f"{where} has no *.safetensors file: it is not a checkpoint, or its weights are missing")
    others = f" and {len(unsafe) - 1} more" if len(unsafe) > 1 else ""
    return CheckpointError(
        f"{where} has its weights as {unsafe[0]}{others}; Tenfold reads safetensors only, because pickled weights can "
        "run code. Convert them once with transformers, then pass the new directory: "
        f"AutoModelForCausalLM.from_pretrained({where!r}).save_pretrained(DIRECTORY)"
    )


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
