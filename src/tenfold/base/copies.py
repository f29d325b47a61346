"""Copies of a run's checkpoints in an object store, made by all of its processes, which share no file system.

A checkpoint is a directory, named by its step, in which each process has what it wrote itself: parts of arrays, which
are zarr's chunks and named by their place, and files about the whole, of which the first process's count. A copy is
what all of them put under `step/attempt/`; an attempt is one start of the run, so that parts of two never mix, and its
name ends with the number of processes. An object store has no directories that are there at once or not at all: a copy
counts when each process has put its marker there, last, with the sizes and checksums of what it put. Only parts that
are needed are fetched (decision record 0019).
"""

import json
import logging
import re
import shutil
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, product
from math import ceil
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from tenfold.base.errors import CheckpointError
from tenfold.base.storage import copy_object, open_store

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

logger = logging.getLogger(__name__)

Box = Sequence[tuple[int, int]]
"""Part of an array: of each dim, the first index and the one after the last."""

_MARKER = "COPIED"
_COPIED = re.compile(r"(\d+)/([0-9a-f]+-[0-9a-f]+-[1-9]\d*)/(.+)")
_PART = re.compile(r"\d+(\.\d+)*")
_ABOUT_ARRAY = ".zarray"
_POLL_S = 0.05
_STREAMS = 8
_BLOCK = 2**20


class Copy(NamedTuple):
    """A copy's step, and the attempt that made it, whose time is what its name begins with."""

    step: int
    attempt: str

    @property
    def markers(self) -> list[str]:
        """The names of the objects that are put last, one by each process."""
        return [f"{_MARKER}-{process}" for process in range(int(self.attempt.rpartition("-")[2]))]

    def __str__(self) -> str:
        return f"{self.step}/{self.attempt}"


class _Content(NamedTuple):
    """What tells a file from a damaged one."""

    size: int
    crc32: int


class Copies:
    """The copies of what is in a directory. They are made by a thread, one after the other.

    Args:
        uri: a `gs://`, `s3://` or `az://` URI.
        directory: exists, and is this process's own.
        process: which one this is.
        processes: how many make the copies.
    """

    def __init__(self, uri: str, directory: Path, process: int = 0, processes: int = 1) -> None:
        self.uri = uri.rstrip("/")
        self._directory = directory
        self._process, self._processes = process, processes
        self._attempt = ""
        self._copied: dict[int, Copy] = {}
        self._thread = ThreadPoolExecutor(1, "copies")
        self._closing = Event()
        self._last: Future[None] | None = None

    # --- what is there ----------------------------------------------------------------------------------------------

    def look(self) -> bytes:
        """What the first process finds at its start, for all to `begin` with; of other processes it is empty.

        Raises:
            CheckpointError: if the store cannot be read.
        """
        if self._process > 0:
            return b""
        with open_store(self.uri) as store:
            newest = {copy.step: copy for copy in sorted(_whole(_list(store)))}
        attempt = f"{time.time_ns():016x}-{uuid.uuid4().hex[:8]}-{self._processes}"
        return json.dumps({"attempt": attempt, "copies": list(newest.values())}).encode()

    def begin(self, found: bytes) -> bytes:
        """Begins an attempt, and fetches what copies say about the whole; of parts of arrays, none.

        Returns which that could be read of, for all to `agree` on.
        """
        known = json.loads(found)
        self._attempt = known["attempt"]
        for copy in (Copy(*each) for each in known["copies"]):
            try:
                with open_store(self.uri) as store:
                    self._fetch_about(store, copy, self._read_markers(store, copy, copy.markers[:1]))
                self._copied[copy.step] = copy
            except CheckpointError as error:
                logger.warning("a copy is damaged and is passed over: %s", error)
        return json.dumps({"found": len(known["copies"]), "steps": list(self._copied)}).encode()

    def agree(self, begun: Sequence[bytes]) -> None:
        """Leaves in the directory the copies that all processes could read.

        Raises:
            CheckpointError: if there are copies, but none that all can read.
        """
        answers = [json.loads(each) for each in begun]
        steps = set[int].intersection(*(set(each["steps"]) for each in answers))
        if answers[0]["found"] and not steps:
            raise CheckpointError(
                f"none of the {answers[0]['found']} checkpoints in {self.uri} can be read by all processes. If the "
                "place can be reached, they are damaged: start anew in another directory"
            )
        self._copied = {step: copy for step, copy in self._copied.items() if step in steps}
        for path in self._directory.iterdir():
            if int(path.name) not in steps:
                shutil.rmtree(path)

    def fetch(self, step: int, needed: Mapping[str, Sequence[Box]]) -> bytes:
        """Fetches those parts of a checkpoint's arrays that are needed, of which the directory keeps none.

        Args:
            step: of the checkpoint.
            needed: parts of each array, by the path of the array in the checkpoint.

        Raises:
            CheckpointError: if the copy is not whole or damaged, or the store cannot be read.
        """
        if step not in self._copied:
            raise CheckpointError(f"{self.uri} has no whole copy of step {step}")
        copy = self._copied[step]
        with open_store(self.uri) as store:
            files = self._read_markers(store, copy, copy.markers)
            self._fetch_about(store, copy, files)
            parts = [name for array, boxes in needed.items() for name in self._parts(step, array, boxes)]
            missing = [name for name in parts if name not in files]
            if missing:
                raise CheckpointError(f"{self.uri}/{copy} lacks {missing[0]}, and {len(missing) - 1} other parts")
            self._fetch(store, copy, {name: files[name] for name in parts})
        return b""

    def _read_markers(self, store: "ObjectStore", copy: Copy, markers: Sequence[str]) -> dict[str, _Content]:
        """The files that processes put into a copy."""
        try:
            with ThreadPoolExecutor(_STREAMS) as pool:
                texts = pool.map(partial(_read, store), [f"{copy}/{marker}" for marker in markers])
                return {name: _Content(*about) for text in texts for name, about in json.loads(text).items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.uri}/{copy}: a marker is damaged: {error}") from error

    def _parts(self, step: int, array: str, boxes: Sequence[Box]) -> set[str]:
        """The names of the parts of an array that are in boxes of it."""
        about: Any = json.loads((self._directory / str(step) / array / _ABOUT_ARRAY).read_text(encoding="utf-8"))
        dot = about.get("dimension_separator", ".")
        spans = (
            [range(start // size, ceil(stop / size)) for (start, stop), size in zip(box, about["chunks"], strict=True)]
            for box in boxes
        )
        places = chain.from_iterable(product(*each) for each in spans)
        return {f"{array}/{dot.join(map(str, place)) or '0'}" for place in places}

    def _fetch_about(self, store: "ObjectStore", copy: Copy, files: Mapping[str, _Content]) -> None:
        self._fetch(store, copy, {name: about for name, about in files.items() if not _is_part(name)})

    def _fetch(self, store: "ObjectStore", copy: Copy, files: Mapping[str, _Content]) -> None:
        def fetch(name: str, about: _Content) -> None:
            target = self._directory / str(copy.step) / name
            if target.exists():
                if _measure(target) == about:
                    return
                target.unlink()
            copy_object(store, store.head(f"{copy}/{name}"), target, lambda _: None, self._closing)
            if _measure(target) != about:
                raise CheckpointError(f"{self.uri}/{copy}/{name} is not what was put there")

        with ThreadPoolExecutor(_STREAMS) as pool:
            list(pool.map(fetch, files.keys(), files.values()))

    # --- putting, and removing ---------------------------------------------------------------------------------------

    def start(self, step: int) -> None:
        """Starts to copy a checkpoint once it has its name; and to remove those that the directory no longer has.

        Returns when the one before is copied, so that it is not removed before that.
        """
        self.settle()
        self._last = self._thread.submit(self._copy, self._directory / str(step))

    def settle(self) -> None:
        """Returns when what was started has ended, well or not."""
        if self._last is not None and (error := self._last.exception()):
            logger.warning("a checkpoint was not copied, and is tried again with the next one: %s", error)
        self._last = None

    def finish(self) -> bytes:
        """Returns nothing when the store has this process's part of what the directory has, which nothing writes to.

        Raises:
            CheckpointError: if it cannot be written.
        """
        self.settle()
        self._thread.submit(self._copy, self._directory).result()
        return b""

    def remove(self, steps: Sequence[int]) -> None:
        """Removes some checkpoints, which no process uses, so that others of the same steps can take their places.

        Copies of former attempts stay until later ones are whole: perhaps they could only not be read today.

        Raises:
            CheckpointError: if the store cannot be written.
        """
        for step in steps:
            self._copied.pop(step, None)
            shutil.rmtree(self._directory / str(step))
        if self._process == 0 and steps:
            with open_store(self.uri) as store:
                for copy, names in _list(store).items():
                    if copy.step in steps and copy.attempt == self._attempt:
                        _remove(store, copy, names)

    def prune(self) -> None:
        """Removes copies of what the directory no longer has; after `finish` of all processes.

        Raises:
            CheckpointError: if the store cannot be written.
        """
        self.finish()

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        self._thread.shutdown()

    def _copy(self, awaited: Path) -> None:
        while not awaited.exists():
            if self._closing.wait(_POLL_S):
                return
        with open_store(self.uri) as store:
            here = {int(path.name) for path in self._directory.iterdir() if path.name.isdecimal()}
            for step in sorted(here - self._copied.keys()):
                self._put(store, Copy(step, self._attempt))
            self._prune(store, here)
        for path in self._directory.glob("[0-9]*/**/*"):
            if _is_part(path.name) and path.is_file():
                path.unlink()  # the store has it, and disks of hosts are small

    def _put(self, store: "ObjectStore", copy: Copy) -> None:
        directory = self._directory / str(copy.step)
        files = {str(path.relative_to(directory)): path for path in directory.rglob("*") if path.is_file()}
        if self._process > 0:
            files = {name: path for name, path in files.items() if _is_part(name)}

        def put(name: str, path: Path) -> _Content:
            store.put(f"{copy}/{name}", path)
            return _measure(path)

        with ThreadPoolExecutor(_STREAMS) as pool:
            about = dict(zip(files, pool.map(put, files.keys(), files.values()), strict=True))
        store.put(f"{copy}/{copy.markers[self._process]}", json.dumps(about).encode())
        self._copied[copy.step] = copy

    def _prune(self, store: "ObjectStore", here: set[int]) -> None:
        """Removes what the directory no longer has; but never the latest copy that is whole."""
        if self._process > 0:
            return
        listed = _list(store)
        kept = {self._copied[step] for step in here if step in self._copied} | {max(_whole(listed), default=None)}
        for copy in listed.keys() - kept:
            if copy.attempt <= self._attempt:  # a later one is another's
                _remove(store, copy, listed[copy])


def _read(store: "ObjectStore", name: str) -> bytes:
    return bytes(store.get(name).bytes())


def _measure(path: Path) -> _Content:
    size, crc32 = 0, 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size, crc32 = size + len(block), zlib.crc32(block, crc32)
    return _Content(size, crc32)


def _is_part(name: str) -> bool:
    return _PART.fullmatch(name.rpartition("/")[2]) is not None


def _whole(listed: Mapping[Copy, Sequence[str]]) -> list[Copy]:
    return [copy for copy, names in listed.items() if not set(copy.markers) - set(names)]


def _remove(store: "ObjectStore", copy: Copy, names: Sequence[str]) -> None:
    for some in ([n for n in names if n in copy.markers], [n for n in names if n not in copy.markers]):
        if some:
            store.delete([f"{copy}/{name}" for name in some])  # markers first: what is left of a copy is none


def _list(store: "ObjectStore") -> dict[Copy, list[str]]:
    """The names of the objects of each copy, whole or not."""
    parts: Iterable[Sequence[ObjectMeta]] = store.list()  # pyright: ignore[reportUnknownMemberType]
    found: dict[Copy, list[str]] = {}
    for path in (o["path"] for o in chain.from_iterable(parts)):
        if copied := _COPIED.fullmatch(path):
            step, attempt, name = copied.groups()
            found.setdefault(Copy(int(step), attempt), []).append(name)
    return found
