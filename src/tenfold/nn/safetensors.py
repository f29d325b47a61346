"""Reading and writing the safetensors format.

A file is the length of a JSON header (8 bytes, little endian), the header, and the tensors' bytes, end to end and in C
order (https://github.com/huggingface/safetensors#format). Files are mapped into memory, so that opening one reads its
header only, and bfloat16 and float8 come as `ml_dtypes`.
"""

import json
import math
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from tenfold.base.errors import CheckpointError
from tenfold.base.files import atomic_write
from tenfold.base.mapped import MappedTensors, end_to_end

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
"""The format's names of the dtypes that numpy can hold."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000
_MAX_DIMS = 32
_MAX_BYTES = 2**62


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its dtype, shape, and first byte in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile(MappedTensors[TensorInfo]):
    """The tensors of one file, by name, as read-only views of the mapped file.

    Attributes:
        metadata: the header's free-form strings.
    """

    def __init__(self, path: Path, infos: dict[str, TensorInfo], metadata: dict[str, str], mapped: mmap.mmap) -> None:
        super().__init__(path, infos, [mapped])
        self.metadata = metadata

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.infos[name]
        return self._view(0, info.offset, info.shape, info.dtype)


def open(path: Path) -> SafetensorsFile:
    """Opens a file: checks its header and maps the tensors, which are read when they are used.

    Raises:
        CheckpointError: if it cannot be read, is truncated, or breaks the format's rules; names file and tensor.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            header, start = _read_header(path, file, size)
            infos, metadata = _read_infos(path, header, start, size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return SafetensorsFile(path, infos, metadata, mapped)


def _read_header(path: Path, file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    file.seek(0)
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or (length <= _MAX_HEADER and 8 + length > size):
        raise CheckpointError(f"{path} is truncated within its header ({size} bytes); download or write it again")
    if length > _MAX_HEADER:
        raise CheckpointError(f"{path} is not a safetensors file: its header would be {length} bytes long")
    text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: bad header ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file: its header is not a JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def _read_infos(
    path: Path, header: dict[str, Any], start: int, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ in its header does not map names to strings")
    infos = {name: _read_info(path, name, entry, start) for name, entry in header.items()}
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    spans = ((name, info.offset - start, info.nbytes) for name, info in infos.items())
    behind = size - start - end_to_end(path, spans, start, size)
    if behind:
        raise CheckpointError(f"{path}: {behind} bytes after the last tensor belong to none; the file is damaged")
    return infos, metadata


def _read_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(span) or len(span) != 2:
        raise CheckpointError(f"{path}: the header's entry of {name!r} is not a dtype, a shape and data_offsets")
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name!r} has the dtype {dtype!r}, which is not supported: {', '.join(DTYPES)}")
    if len(shape) > _MAX_DIMS or math.prod(max(dim, 1) for dim in shape) >= _MAX_BYTES // 16:
        raise CheckpointError(f"{path}: {name!r} has the impossible shape {shape}")
    info = TensorInfo(DTYPES[dtype], tuple(shape), start + span[0])
    if info.nbytes != span[1] - span[0]:
        raise CheckpointError(
            f"{path}: {name!r} of shape {shape} and dtype {dtype} takes {info.nbytes} bytes, "
            f"but the header gives it {span[1] - span[0]}"
        )
    return info


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < _MAX_BYTES for value in values)


@dataclass(frozen=True)
class Deferred:
    """A tensor to write that is made when its turn comes, so that one at a time is in memory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, tensors: Mapping[str, np.ndarray | Deferred], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file that appears whole or not at all. Wider dtypes come first, so that every tensor is aligned.

    Args:
        path: the file, replaced if it exists.
        tensors: by name; dtypes of `DTYPES`.
        metadata: defaults to {"format": "pt"}, without which `transformers` refuses a file.

    Raises:
        CheckpointError: if a dtype has no name in the format.
        ValueError: if a deferred tensor is made with another shape or dtype than announced.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize))
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, tensor in ordered.items():
        dtype = np.dtype(tensor.dtype)
        if dtype not in _NAMES:
            raise CheckpointError(f"{path}: {name!r} has the dtype {dtype}, which safetensors cannot hold")
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in ordered.items():
            file.write(_bytes(name, tensor))


def _bytes(name: str, tensor: np.ndarray | Deferred) -> memoryview:
    """A tensor's bytes in C order; a copy only if they do not lie that way."""
    array = tensor.make() if isinstance(tensor, Deferred) else tensor
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(f"{name}: announced as {tensor.dtype} {tensor.shape}, made as {array.dtype} {array.shape}")
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
