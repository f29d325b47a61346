"""Where models come from: a local directory, the Hugging Face hub, or an object store."""

import hashlib
import re
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import WeakFileLock, tqdm
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from tenfold.base.errors import CheckpointError, ConfigError
from tenfold.base.files import CHECKPOINT_FILES, SECOND_COPIES, gguf_pattern, matches, no_safetensors
from tenfold.base.paths import cache_dir

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

OBJECT_STORES = ("gs", "s3", "az")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_STREAMS = 4
_CHUNK = 16 * 2**20  # a request must end within the client's timeout of 30 s


def fetch(
    model: str | Path, *, revision: str | None = None, files: Sequence[str] = CHECKPOINT_FILES, progress: bool = False
) -> Path:
    """The local directory or GGUF file of a model, downloaded if need be.

    Args:
        model: a local directory or GGUF file or its `file://` URI, used in place; a `gs://`, `s3://` or `az://` URI of
            a directory or GGUF file, which is copied into the cache, and again when it has changed; or a Hugging Face
            id, which `huggingface_hub` keeps in its own cache. An existing directory wins over an id of the same name.
            Of a GGUF model that is split, any of its files stands for all.
        revision: branch, tag or commit; for a Hugging Face id only.
        files: shell patterns of the top-level files to download.
        progress: shows a progress bar while downloading.

    Raises:
        CheckpointError: if the model does not exist, may not be read, cannot be reached, or has no safetensors.
    """
    text = str(model)
    scheme = text.partition("://")[0] if "://" in text else None
    path = Path(url2pathname(urlsplit(text).path)) if scheme == "file" else Path(text).expanduser()
    is_path = scheme == "file" or (scheme is None and (path.exists() or _is_gguf(text) or not _HUB_ID.fullmatch(text)))
    if revision is not None and (is_path or scheme is not None):
        raise CheckpointError(f"{text}: only a Hugging Face id has revisions; leave revision={revision!r} out")
    if is_path:
        return _local(text, path)
    if scheme in OBJECT_STORES:
        return _fetch_objects(text, files, progress)
    if scheme is not None:
        known = ", ".join(f"{known}://" for known in ("file", *OBJECT_STORES))
        raise CheckpointError(f"{text}: {scheme}:// is not supported; pass {known}, a directory or a Hugging Face id")
    return _fetch_hub(text, revision, files, progress)


def _local(text: str, path: Path) -> Path:
    if path.is_dir():
        return path.absolute()
    if path.exists():
        if _is_gguf(path.name):
            return path.absolute()
        raise CheckpointError(f"{text} is a file; pass the directory with config.json and the weights, or a .gguf")
    if _is_gguf(path.name):
        raise CheckpointError(
            f"{text}: there is no such file. A GGUF file is read from a path or an object store; one from the Hugging "
            "Face hub has to be downloaded first, such as with `hf download REPOSITORY FILE --local-dir .`"
        )
    raise CheckpointError(f"{text}: there is no such directory")


def _is_gguf(name: str) -> bool:
    return name.endswith(".gguf")


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def _fetch_hub(repo: str, revision: str | None, files: Sequence[str], progress: bool) -> Path:
    try:
        directory = huggingface_hub.snapshot_download(  # pyright: ignore[reportUnknownMemberType]
            repo,
            revision=revision,
            allow_patterns=list(files),
            ignore_patterns=["*/*", *SECOND_COPIES],  # `*` matches slashes here: folders hold other formats
            tqdm_class=None if progress else _NoBar,
        )
    except hub_errors.GatedRepoError:
        raise CheckpointError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo}, then set HF_TOKEN to a token of "
            "that account (or run `hf auth login`)"
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo} is neither a local directory nor a repository on the Hugging Face hub that can be seen. Check the "
            "spelling; for a private one, set HF_TOKEN"
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo} has no revision {revision!r} on the Hugging Face hub") from None
    except hub_errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is not a local directory, not (completely) in the Hugging Face cache, and the hub cannot be "
            "reached (or HF_HUB_OFFLINE is set). Connect to the network, or pass the directory of a checkpoint"
        ) from error
    except hub_errors.HFValidationError as error:
        raise CheckpointError(f"{repo} is neither a local directory nor a Hugging Face id: {error}") from None
    except (OSError, hub_errors.XetDownloadError) as error:
        raise CheckpointError(f"downloading {repo} failed, start again to resume: {error}") from error
    if matches("model.safetensors", files) and not any(Path(directory).glob("*.safetensors")):
        raise no_safetensors(repo, _hub_names(repo, revision))
    return Path(directory)


def _hub_names(repo: str, revision: str | None) -> list[str]:
    try:
        return huggingface_hub.list_repo_files(repo, revision=revision)
    except (OSError, hub_errors.XetDownloadError):  # offline: the advice is then the general one
        return []


class _NoBar(tqdm):
    """A progress bar that is never shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})  # pyright: ignore[reportUnknownMemberType]


def local_directory(directory: str) -> Path:
    """The directory that a path or a `file://` URI names, and that need not exist.

    Raises:
        ConfigError: for another URI.
    """
    scheme, is_uri, _ = directory.partition("://")
    if not is_uri:
        return Path(directory).absolute()
    if scheme == "file":
        return Path(url2pathname(urlsplit(directory).path))
    known = ", ".join(f"{known}://" for known in ("file", *OBJECT_STORES))
    raise ConfigError(f"{directory}: nothing is written to {scheme}://; name a directory or {known}")


# --- object stores --------------------------------------------------------------------------------------------------


def _fetch_objects(uri: str, files: Sequence[str], progress: bool) -> Path:
    """Copies what is directly under a URI, or a GGUF file there, into a cache directory named by its content's version.

    So a file that stands there under its own name is whole and current; parts of files are resumed.
    """
    directory, _, name = uri.rpartition("/") if _is_gguf(uri) else (uri.rstrip("/"), "", "")
    files = (gguf_pattern(name),) if name else files
    with open_store(uri, directory) as store:
        listed = store.list_with_delimiter()["objects"]  # pyright: ignore[reportUnknownMemberType]
        wanted = [o for o in listed if matches(o["path"], files) and not matches(o["path"], SECOND_COPIES)]
        if name and name not in [o["path"] for o in wanted]:
            raise CheckpointError(f"{uri}: there is no such file")
        if not wanted and not any(_is_gguf(o["path"]) for o in listed):
            raise CheckpointError(f"{uri} has no file of a checkpoint; pass the URI of the directory with config.json")
        if matches("model.safetensors", files) and not any(o["path"].endswith(".safetensors") for o in wanted):
            raise no_safetensors(uri, [o["path"] for o in listed])
        return _copy_objects(uri, store, wanted, progress) / name


def fetch_files(where: str, files: Sequence[str], *, progress: bool = False) -> Path:
    """The local path of a file, or of a directory of files at any depth; copied from an object store if need be.

    Args:
        where: a path, its `file://` URI, or a `gs://`, `s3://` or `az://` URI, which is copied as `fetch` does it. A
            URI whose name has a suffix is a file's.
        files: shell patterns of the names to copy.
        progress: shows a progress bar while copying.

    Raises:
        CheckpointError: if there is nothing there, or it cannot be reached.
    """
    scheme = where.partition("://")[0] if "://" in where else None
    if scheme in OBJECT_STORES:
        directory, _, name = where.rpartition("/") if Path(where).suffix else (where.rstrip("/"), "", "")
        with open_store(where, directory) as store:
            parts: Iterable[Sequence[ObjectMeta]] = store.list()  # pyright: ignore[reportUnknownMemberType]
            listed = list(chain.from_iterable(parts))
            wanted = [o for o in listed if (o["path"] == name if name else matches(Path(o["path"]).name, files))]
            if not wanted:
                raise CheckpointError(f"{where} has none of {', '.join(files)}; check the URI")
            return _copy_objects(where, store, wanted, progress) / name
    path = Path(url2pathname(urlsplit(where).path)) if scheme == "file" else Path(where).expanduser()
    if not path.exists():
        raise CheckpointError(f"{where}: there is no such file or directory")
    return path.absolute()


def put_files(directory: Path, uri: str) -> None:
    """Copies all files of a directory to an object store, in place of those of the same names.

    Raises:
        CheckpointError: if that cannot be written.
    """
    names = [str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()]
    with open_store(uri) as store, ThreadPoolExecutor(_STREAMS) as pool:
        list(pool.map(store.put, names, [directory / name for name in names]))


@contextmanager
def open_store(uri: str, directory: str | None = None) -> "Generator[ObjectStore]":
    """The store of a directory, of a URI or given by one of its own; what goes wrong with it is a CheckpointError that
    names the URI."""
    try:
        import obstore.exceptions  # noqa: PLC0415 -- an extra
        import obstore.store  # noqa: PLC0415
    except ImportError:
        raise CheckpointError(f"{uri}: object stores need an extra package: pip install 'tenfold[cloud]'") from None
    try:
        yield obstore.store.from_url(
            directory or uri, retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
        )
    except obstore.exceptions.PreconditionError:
        raise CheckpointError(f"{uri} changed while it was being downloaded; start again") from None
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        reason = str(error).partition("\n\nDebug source")[0]
        raise CheckpointError(
            f"{uri} cannot be used; check the URI and the credentials, then start again (a download resumes): {reason}"
        ) from error


def _copy_objects(uri: str, store: "ObjectStore", objects: Sequence["ObjectMeta"], progress: bool) -> Path:
    versions = sorted((o["path"], o["size"], o["e_tag"] or str(o["last_modified"])) for o in objects)
    home = cache_dir() / "objects" / f"{uri.rstrip('/').rpartition('/')[2]}-{_digest(uri.rstrip('/'))}"
    home.mkdir(parents=True, exist_ok=True)
    directory = home / _digest(repr(versions))
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with WeakFileLock(home / ".lock"), Progress(*columns, disable=not progress) as bar:
        directory.mkdir(exist_ok=True)
        missing = [o for o in objects if not (directory / o["path"]).exists()]
        task = bar.add_task(uri, total=sum(o["size"] for o in missing))
        stop = threading.Event()
        with ThreadPoolExecutor(_STREAMS) as pool:
            copies = [
                pool.submit(copy_object, store, o, directory / o["path"], lambda n: bar.advance(task, n), stop)
                for o in missing
            ]
            try:
                for copy in as_completed(copies):
                    copy.result()
            finally:
                stop.set()
        for stale in [d for d in home.iterdir() if d.is_dir() and d != directory]:
            shutil.rmtree(stale, ignore_errors=True)
    return directory


def copy_object(
    store: "ObjectStore", o: "ObjectMeta", target: Path, advance: Callable[[int], None], stop: threading.Event
) -> None:
    """Copies one object to a file, which has its name when it is whole; goes on with a part of it that is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with part.open("ab") as file:
        advance(file.tell())
        while file.tell() < o["size"] and not stop.is_set():
            span = (file.tell(), min(file.tell() + _CHUNK, o["size"]))
            chunk = store.get(o["path"], options={"range": span, "if_match": o["e_tag"]}).bytes()
            file.write(chunk)
            advance(len(chunk))
    if not stop.is_set():
        part.replace(target)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
