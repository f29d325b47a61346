"""Reading and writing the GGUF format, versions 2 and 3, little endian.

A file is a magic number, a version, and two counts; then typed metadata by key; then the name, dims, type and offset of
every tensor; then the tensors' bytes, each at a multiple of an alignment
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A model may be split into files `…-00001-of-00003.gguf`,
whose first has all the metadata. Files are mapped into memory, so that opening them reads what comes before the tensors
only. Imports no jax.
"""

import math
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
from jaxtyping import Float32

from tenfold.base import ggml_blocks
from tenfold.base.errors import CheckpointError
from tenfold.base.files import GGUF_SPLIT, atomic_write
from tenfold.base.ggml_blocks import FLOATS, OTHER_TYPES, GGMLType
from tenfold.base.mapped import MappedTensors, end_to_end

MAGIC = b"GGUF"
ALIGNMENT = 32
"""What tensors are aligned to where `general.alignment` does not say."""

_VERSION = 3
_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype] = {
    number: np.dtype(name).newbyteorder("<")
    for number, name in (
        *((0, "u1"), (1, "i1"), (2, "u2"), (3, "i2"), (4, "u4"), (5, "i4")),
        *((6, "f4"), (7, "?"), (10, "u8"), (11, "i8"), (12, "f8")),
    )
}
"""The value types other than strings and arrays."""

_SMALLEST = {_STRING: 8, _ARRAY: 12} | {number: dtype.itemsize for number, dtype in _SCALARS.items()}
"""Bytes that a value of each type takes at least."""

_MAX_HEADER = 100_000_000
_MAX_NAME = 65535
_MAX_DEPTH = 4
_MAX_DIMS = 4
_MAX_ALIGNMENT = 2**20
_MAX_BYTES = 2**62


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its type, shape (as numpy has it: a row is the last dim), first byte in its file, and which file."""

    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    part: int = 0

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape of what the file holds: the last dim in blocks is counted in bytes."""
        if self.type in FLOATS or not self.shape:
            return self.shape
        return (*self.shape[:-1], ggml_blocks.row_size(self.type, self.shape[-1]))

    @property
    def nbytes(self) -> int:
        itemsize = FLOATS[self.type].itemsize if self.type in FLOATS else 1
        return math.prod(self.raw_shape) * itemsize


class GGUFFile(MappedTensors[TensorInfo]):
    """The tensors of a model, by name, as read-only views of the mapped files.

    A tensor of a float type has its shape and dtype. One in blocks is uint8 and its last dim counts bytes, which is
    what `ggml_blocks.unpack` takes.

    Attributes:
        metadata: by key. Numbers, booleans and strings are Python's; arrays of numbers are numpy's, others are lists.
    """

    def __init__(
        self, path: Path, metadata: dict[str, Any], infos: dict[str, TensorInfo], mapped: Sequence[mmap.mmap]
    ) -> None:
        super().__init__(path, infos, mapped)
        self.metadata = metadata

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.infos[name]
        return self._view(info.part, info.offset, info.raw_shape, FLOATS.get(info.type, np.dtype(np.uint8)))

    def dequantize(self, name: str) -> Float32[np.ndarray, "..."]:
        """A whole tensor in float32."""
        info, raw = self.infos[name], self[name]
        return raw.astype(np.float32) if info.type in FLOATS else ggml_blocks.dequantize(raw, info.type)


# --- reading --------------------------------------------------------------------------------------------------------


def open(path: Path) -> GGUFFile:
    """Opens a file, or all files of a split that it belongs to: checks what they declare and maps the tensors.

    Raises:
        CheckpointError: if a file cannot be read, is missing, truncated, or breaks the format's rules, or has a tensor
            of a type that is not implemented; names file and tensor.
    """
    first = _read_part(path, 0)
    paths = _split_paths(path, first.metadata)
    if len(paths) == 1:
        return GGUFFile(path, first.metadata, first.infos, [first.mapped])
    parts = [_read_part(part_path, number) for number, part_path in enumerate(paths)]
    infos: dict[str, TensorInfo] = {}
    for part_path, part in zip(paths, parts, strict=True):
        _check_split(part_path, part, len(paths))
        for name, info in part.infos.items():
            if name in infos:
                raise CheckpointError(f"the tensor {name!r} is in both {paths[infos[name].part]} and {part_path}")
            infos[name] = info
    declared = _split_number(paths[0], parts[0].metadata, "tensors.count", len(infos))
    if declared != len(infos):
        raise CheckpointError(f"{paths[0]} says that its split has {declared} tensors, but the files have {len(infos)}")
    return GGUFFile(paths[0], parts[0].metadata, infos, [part.mapped for part in parts])


@dataclass(frozen=True)
class _Part:
    """One file, read and checked by itself."""

    number: int
    metadata: dict[str, Any]
    infos: dict[str, TensorInfo]
    mapped: mmap.mmap


class _Cursor:
    """Reads values one after the other, and never beyond the end of the header's budget or the file."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.at = 0
        self._mapped = mapped
        self._end = min(len(mapped), _MAX_HEADER)

    @property
    def left(self) -> int:
        """Bytes that may still be read."""
        return self._end - self.at

    def bytes(self, count: int, what: str) -> bytes:
        """The next bytes."""
        if count > self.left:
            self.fail_short(what)
        self.at += count
        return self._mapped[self.at - count : self.at]

    def fail_short(self, what: str) -> NoReturn:
        """The error for something that would end behind the end."""
        if self._end < len(self._mapped):
            raise CheckpointError(f"{self.path} is damaged: it would have more than {_MAX_HEADER} bytes of metadata")
        raise CheckpointError(f"{self.path} is truncated within {what} ({self._end} bytes); download or write it again")

    def uint(self, size: int, what: str) -> int:
        """The next unsigned integer of some bytes."""
        return int.from_bytes(self.bytes(size, what), "little")

    def string(self, what: str) -> str:
        """The next length and the UTF-8 text after it."""
        return self.strings(1, what)[0]

    def name(self, what: str) -> str:
        """The next string, if it is short enough for a name."""
        name = self.string(what)
        if len(name) > _MAX_NAME:
            raise CheckpointError(f"{self.path} is damaged: {what} has {len(name)} characters")
        return name

    def strings(self, count: int, what: str) -> list[str]:
        """The next strings. Vocabularies have hundreds of thousands, so that this is one loop."""
        mapped, at, end, found = self._mapped, self.at, self._end, list[str]()
        try:
            for _ in range(count):
                start = at + 8
                at = start + int.from_bytes(mapped[at:start], "little")
                if at > end:
                    self.fail_short(what)
                found.append(mapped[start:at].decode("utf-8"))
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path} is damaged: {what} is not valid UTF-8") from None
        self.at = at
        return found


def _read_part(path: Path, number: int) -> _Part:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            magic = file.read(4)
            if magic != MAGIC:
                what = "is truncated within its magic number" if MAGIC.startswith(magic) else "is not a GGUF file"
                raise CheckpointError(f"{path} {what}: it begins with {magic!r}, not {MAGIC!r} ({size} bytes)")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    cursor = _Cursor(path, mapped)
    tensors, pairs = _read_counts(cursor)
    metadata = _read_metadata(cursor, pairs)
    infos = _read_infos(cursor, tensors, number)
    return _Part(number, metadata, _place(cursor, infos, _alignment(path, metadata), len(mapped)), mapped)


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    cursor.bytes(4, "its magic number")
    version = cursor.uint(4, "its version")
    if version and version % 65536 == 0:
        raise CheckpointError(f"{cursor.path} is a big-endian GGUF file; convert it to little endian")
    if version not in (2, 3):
        raise CheckpointError(f"{cursor.path} has the GGUF version {version}; supported are 2 and 3: convert it again")
    return cursor.uint(8, "its count of tensors"), cursor.uint(8, "its count of metadata")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    if count > cursor.left // 13:  # a key's length, a type, and a value of one byte
        raise CheckpointError(f"{cursor.path} is damaged: {count} keys of metadata do not fit into it")
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.name("a key of its metadata")
        if key in metadata:
            raise CheckpointError(f"{cursor.path} is damaged: its metadata have the key {key!r} twice")
        metadata[key] = _read_value(cursor, cursor.uint(4, f"the type of {key!r}"), f"the metadata {key!r}")
    return metadata


def _read_value(cursor: _Cursor, kind: int, what: str, depth: int = 0) -> Any:
    if kind in _SCALARS:
        value = cursor.bytes(_SCALARS[kind].itemsize, what)
        return _numbers(cursor, kind, value, what)[0].item()
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY or depth == _MAX_DEPTH:
        raise CheckpointError(f"{cursor.path} is damaged: {what} has the unknown type {kind} or too many dims")
    inner, count = cursor.uint(4, what), cursor.uint(8, what)
    if inner not in _SMALLEST:
        raise CheckpointError(f"{cursor.path} is damaged: {what} is an array of the unknown type {inner}")
    if count > cursor.left // _SMALLEST[inner]:
        raise CheckpointError(f"{cursor.path} is damaged or truncated: {what} would have {count} elements")
    if inner in _SCALARS:
        return _numbers(cursor, inner, cursor.bytes(count * _SCALARS[inner].itemsize, what), what)
    if inner == _STRING:
        return cursor.strings(count, what)
    return [_read_value(cursor, inner, what, depth + 1) for _ in range(count)]


def _numbers(cursor: _Cursor, kind: int, data: bytes, what: str) -> np.ndarray:
    if _SCALARS[kind] == np.bool_ and data.strip(b"\0\1"):
        raise CheckpointError(f"{cursor.path} is damaged: {what} has a boolean that is neither 0 nor 1")
    return np.frombuffer(data, _SCALARS[kind])


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment % 8 or not 8 <= alignment <= _MAX_ALIGNMENT:
        raise CheckpointError(f"{path} is damaged: general.alignment is {alignment!r}, not a multiple of 8")
    return alignment


def _read_infos(cursor: _Cursor, count: int, part: int) -> dict[str, TensorInfo]:
    """The tensors as the header has them: with offsets into the data, not yet checked against it."""
    if count > cursor.left // 24:  # a name's length, no dims, a type, and an offset
        raise CheckpointError(f"{cursor.path} is damaged: {count} tensors do not fit into it")
    infos: dict[str, TensorInfo] = {}
    known = set(GGMLType)
    for _ in range(count):
        name = cursor.name("a tensor's name")
        what = f"the header's entry of the tensor {name!r}"
        if name in infos:
            raise CheckpointError(f"{cursor.path} is damaged: the tensor {name!r} stands there twice")
        dims = cursor.uint(4, what)
        if dims > _MAX_DIMS:
            raise CheckpointError(f"{cursor.path} is damaged: the tensor {name!r} has {dims} dims")
        shape = tuple(reversed([cursor.uint(8, what) for _ in range(dims)]))
        number, offset = cursor.uint(4, what), cursor.uint(8, what)
        if number not in known:
            raise CheckpointError(
                f"{cursor.path}: {name!r} has the type {OTHER_TYPES.get(number, number)}, which is not supported: "
                + ", ".join(GGMLType.__members__)
            )
        infos[name] = _info(cursor.path, name, TensorInfo(GGMLType(number), shape, offset, part))
    return infos


def _info(path: Path, name: str, info: TensorInfo) -> TensorInfo:
    if math.prod(max(dim, 1) for dim in info.shape) >= _MAX_BYTES // 16 or info.offset >= _MAX_BYTES:
        raise CheckpointError(f"{path}: {name!r} has the impossible shape {list(info.shape)} or offset {info.offset}")
    block = ggml_blocks.block_size(info.type)
    if block > 1 and (not info.shape or info.shape[-1] % block):
        raise CheckpointError(
            f"{path}: {name!r} of shape {list(info.shape)} cannot be {info.type.name}, in blocks of {block} weights"
        )
    return info


def _place(cursor: _Cursor, infos: dict[str, TensorInfo], alignment: int, size: int) -> dict[str, TensorInfo]:
    """The same tensors with offsets into the file, each checked: aligned, behind the one before it, within the file."""
    path, start = cursor.path, cursor.at + -cursor.at % alignment
    for name, info in infos.items():
        if info.offset % alignment:
            raise CheckpointError(f"{path}: {name!r} begins at {info.offset}, which is not aligned to {alignment}")
    end_to_end(path, ((name, info.offset, info.nbytes) for name, info in infos.items()), start, size, alignment)
    return {name: TensorInfo(info.type, info.shape, start + info.offset, info.part) for name, info in infos.items()}


def _split_paths(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """All files of the split that a file belongs to, in order; the file alone if it belongs to none."""
    count = _split_number(path, metadata, "count", 1)
    if count <= 1:
        return [path]
    match = GGUF_SPLIT.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(f"{path} is one of {count} files, whose names must end in -00001-of-{count:05}.gguf etc.")
    paths = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    absent = [other.name for other in paths if not other.exists()]
    if absent:
        raise CheckpointError(f"{path.parent} lacks {absent[0]}, one of {len(absent)} missing of a split into {count}")
    return paths


def _split_number(path: Path, metadata: Mapping[str, Any], what: str, default: int) -> int:
    number = metadata.get(f"split.{what}", default)
    if type(number) is not int or not 0 <= number < 2**31:
        raise CheckpointError(f"{path} is damaged: split.{what} is {number!r:.80}")
    return number


def _check_split(path: Path, part: _Part, count: int) -> None:
    number, of = (_split_number(path, part.metadata, what, -1) for what in ("no", "count"))
    if (number, of) != (part.number, count):
        raise CheckpointError(
            f"{path} is number {number} of {of} by its metadata, counted from 0, but {part.number} of {count} by its "
            "name; download it again"
        )


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deferred:
    """A tensor to write that is made when its turn comes, so that one at a time is in memory.

    `make` gives its values, which are rounded to `type` (F32, F16, BF16, Q8_0 or Q4_0); or, as uint8, the bytes of
    blocks of any type.
    """

    type: GGMLType
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write(path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray | Deferred]) -> None:
    """Writes a file of version 3 that appears whole or not at all.

    Args:
        path: the file, replaced if it exists.
        metadata: strings, booleans, numbers, and arrays of one of them. Python's numbers are written as uint32, or as
            int32, uint64 or int64 if they are outside its range, and as float32; in a list, as int32 and float32.
            numpy's numbers and arrays keep their dtype.
        tensors: by name; arrays of float32, float16 or bfloat16, or deferred ones.

    Raises:
        CheckpointError: if a value or a dtype has no type in the format.
        ValueError: if a tensor cannot be made as announced.
    """
    deferred = {name: _as_deferred(path, name, tensor) for name, tensor in tensors.items()}
    alignment = _alignment(path, metadata)
    header = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = _encode_value(path, key, value)
        header += _encode_string(key) + struct.pack("<I", kind) + data
    end = 0
    for name, tensor in deferred.items():
        info = _info(path, name, TensorInfo(tensor.type, tensor.shape, end))
        dims = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
        header += _encode_string(name) + dims + struct.pack("<IQ", info.type, end)
        end += info.nbytes + -info.nbytes % alignment
    with atomic_write(path) as file:
        file.write(header + bytes(-len(header) % alignment))
        for name, tensor in deferred.items():
            written = file.write(_tensor_bytes(name, tensor))
            file.write(bytes(-written % alignment))


def _as_deferred(path: Path, name: str, tensor: np.ndarray | Deferred) -> Deferred:
    if isinstance(tensor, Deferred):
        return tensor
    found = next((kind for kind, dtype in FLOATS.items() if dtype == tensor.dtype), None)
    if found is None:
        raise CheckpointError(f"{path}: {name!r} has the dtype {tensor.dtype}, which GGUF cannot hold as it is")
    return Deferred(found, tensor.shape, lambda: tensor)


def _tensor_bytes(name: str, tensor: Deferred) -> memoryview:
    made = tensor.make()
    info = TensorInfo(tensor.type, tensor.shape, 0)
    encoded = made.dtype == np.uint8
    if made.shape != (info.raw_shape if encoded else info.shape):
        raise ValueError(f"{name}: announced as {info.type.name} {info.shape}, made as {made.dtype} {made.shape}")
    data = made if encoded else ggml_blocks.quantize(made.reshape(made.shape or 1), tensor.type)
    return np.ascontiguousarray(data).reshape(-1).data


def _encode_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _encode_value(path: Path, key: str, value: Any) -> tuple[int, bytes]:
    if isinstance(value, str):
        return _STRING, _encode_string(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in cast("list[Any]", value)):
        texts = cast("list[str]", value)
        return _ARRAY, struct.pack("<IQ", _STRING, len(texts)) + b"".join(map(_encode_string, texts))
    typed = np.asarray(cast("Any", value))
    if not isinstance(value, np.generic | np.ndarray):
        typed = typed.astype(_narrow(typed))
    kind = next((number for number, dtype in _SCALARS.items() if dtype == typed.dtype), None)
    if kind is None or typed.ndim > 1:
        raise CheckpointError(f"{path}: the metadata {key!r} cannot be written: {value!r:.80}")
    data = typed.astype(_SCALARS[kind]).tobytes()
    return (kind, data) if typed.ndim == 0 else (_ARRAY, struct.pack("<IQ", kind, typed.size) + data)


def _narrow(array: np.ndarray) -> np.dtype:
    """The dtype in which files usually have Python's numbers."""
    if array.dtype.kind not in "iu" or array.size == 0:
        return np.dtype(np.float32) if array.dtype.kind == "f" else array.dtype
    fits = (
        name
        for name in (("u4", "i4", "u8") if array.ndim == 0 else ("i4", "u4", "i8"))
        if np.iinfo(name).min <= array.min() and array.max() <= np.iinfo(name).max
    )
    return np.dtype(next(fits, array.dtype))
