"""Tensors in files that are mapped into memory: what the formats of checkpoints have in common."""

import math
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from tenfold.base.errors import CheckpointError

Info = TypeVar("Info")


class MappedTensors(Mapping[str, np.ndarray], Generic[Info]):
    """Tensors by name, as read-only views of the mapped files. A format adds `__getitem__`.

    A view stays valid after the files are deleted or replaced, but not if they are changed in place.

    Attributes:
        path: the file, or the first of several.
        infos: what every tensor is, without reading it.
    """

    def __init__(self, path: Path, infos: dict[str, Info], mapped: Sequence[mmap.mmap]) -> None:
        self.path = path
        self.infos = infos
        self._mapped = mapped
        self._addresses = [np.frombuffer(part, np.uint8).ctypes.data for part in mapped]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def will_need(self, view: np.ndarray) -> None:
        """Has the system read ahead what a view of these files spans."""
        self._advise(view, "MADV_WILLNEED")

    def release(self, view: np.ndarray) -> None:
        """Gives back the memory into which a view of these files was read. It stays usable, and would be read again."""
        self._advise(view, "MADV_DONTNEED")

    def _view(self, part: int, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        count = math.prod(shape)
        if count == 0:
            return np.zeros(shape, dtype)
        return np.frombuffer(self._mapped[part], dtype, count, offset).reshape(shape)

    def _advise(self, view: np.ndarray, advice: str) -> None:
        low, high = np.lib.array_utils.byte_bounds(view)
        if view.size == 0 or not hasattr(mmap, advice):  # Windows has no such advice
            return
        for address, part in zip(self._addresses, self._mapped, strict=True):
            if address <= low and high <= address + len(part):
                start = (low - address) // mmap.PAGESIZE * mmap.PAGESIZE
                part.madvise(getattr(mmap, advice), start, high - address - start)


def end_to_end(path: Path, spans: Iterable[tuple[str, int, int]], start: int, size: int, alignment: int = 1) -> int:
    """Checks that tensors stand one behind the other, each at the first multiple of `alignment` from `start` on.

    Args:
        path: the file, for the message.
        spans: name, first byte after `start`, and bytes of each tensor, in any order.
        start: where the tensors begin.
        size: of the file.

    Returns:
        Where the last one ends, counted from `start`.

    Raises:
        CheckpointError: two overlap, there is a gap, or one ends behind the file; names the tensor.
    """
    end = 0
    for name, offset, nbytes in sorted(spans, key=lambda span: span[1:]):
        if offset != end + -end % alignment:
            what = "overlaps the tensor before it" if offset < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: the tensor {name!r} {what}; the file is damaged")
        end = offset + nbytes
        if start + end > size:
            raise CheckpointError(
                f"{path} is truncated: the tensor {name!r} ends at byte {start + end}, the file at {size}; "
                "download or write it again"
            )
    return end
