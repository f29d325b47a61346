"""Copies of a run's checkpoints in an object store, which Orbax does not write arrays to.

A checkpoint is a directory, named by its step. An object store has no directories that are there at once or not at all;
so a copy counts when the object that is written last is there, `MARKER`.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from tenfold.base.storage import open_store

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

MARKER = "COPIED"
_POLL_S = 0.05


class Copies:
    """The copies of what is in a directory. They are made by a thread, one after the other.

    Args:
        uri: a `gs://`, `s3://` or `az://` URI.
        directory: exists.
    """

    def __init__(self, uri: str, directory: Path) -> None:
        self.uri = uri.rstrip("/")
        self._directory = directory
        self._thread = ThreadPoolExecutor(1, "copies")
        self._closing = Event()
        self._last: Future[None] | None = None

    def fetch(self) -> None:
        """Copies all checkpoints to the directory.

        Raises:
            CheckpointError: if the store cannot be read.
        """
        with open_store(self.uri) as store:
            for step, names in _whole(store).items():
                for name in names:
                    target = self._directory / step / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        file.writelines(store.get(f"{step}/{name}").stream(min_chunk_size=2**23))

    def start(self, step: int) -> None:
        """Starts to copy a checkpoint once it has its name; and to remove those that the directory no longer has."""
        if self._last is not None and self._last.done() and (error := self._last.exception()):
            logger.warning("a checkpoint was not copied, and is tried again with the next one: %s", error)
        self._last = self._thread.submit(self._copy, self._directory / str(step))

    def finish(self) -> None:
        """Returns when the store has what the directory has, which nothing is being written to.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self._thread.submit(self._copy, self._directory).result()

    def remove(self, steps: Sequence[int]) -> None:
        """Removes the copies of some checkpoints, so that others of the same steps can take their places.

        Raises:
            CheckpointError: if the store cannot be written.
        """
        with open_store(self.uri) as store:
            there = _whole(store)
            for step in map(str, steps):
                _remove(store, step, there.get(step, ()))

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        self._thread.shutdown()

    def _copy(self, awaited: Path) -> None:
        while not awaited.exists():
            if self._closing.wait(_POLL_S):
                return
        with open_store(self.uri) as store:
            there = _whole(store)
            here = {path.name for path in self._directory.iterdir() if path.name.isdecimal()}
            for step in sorted(here - there.keys(), key=int):
                files = [path for path in (self._directory / step).rglob("*") if path.is_file()]
                for path in files:
                    store.put(str(path.relative_to(self._directory)), path)
                store.put(f"{step}/{MARKER}", str(time.time()).encode())
            for step in there.keys() - here:
                _remove(store, step, there[step])


def _remove(store: "ObjectStore", step: str, names: Sequence[str]) -> None:
    store.delete(f"{step}/{MARKER}")  # first: what is left of a checkpoint is none
    if names:
        store.delete([f"{step}/{name}" for name in names])


def _whole(store: "ObjectStore") -> dict[str, list[str]]:
    """The names of the files of each checkpoint that is whole."""
    parts: Iterable[Sequence[ObjectMeta]] = store.list()  # pyright: ignore[reportUnknownMemberType]
    found: dict[str, list[str]] = {}
    for path in (o["path"] for o in chain.from_iterable(parts)):
        step, _, name = path.partition("/")
        if step.isdecimal():
            found.setdefault(step, []).append(name)
    return {step: [n for n in names if n != MARKER] for step, names in found.items() if MARKER in names}
