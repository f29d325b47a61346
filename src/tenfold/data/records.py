"""Rows of data by their number: text files, JSON lines, Parquet, and the directories of Hugging Face datasets.

All of it is checked when it is opened, so that a bad row is named before anything is made of it. Rows are read at
random, because data is shuffled: JSON lines by their offsets, and all else out of Arrow files mapped into memory, which
is what Parquet is unpacked into, once, in the cache.
"""

import bisect
import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import orjson

from tenfold.base.errors import DataError
from tenfold.base.files import atomic_write
from tenfold.base.paths import cache_dir
from tenfold.base.storage import fetch_files

DATA_FILES = ("*.txt", "*.jsonl", "*.parquet", "*.arrow", "dataset_dict.json", "dataset_info.json", "state.json")
"""Shell patterns of what data may consist of."""

_SUFFIXES = (".txt", ".jsonl", ".parquet", ".arrow")
_KINDS: dict[type[Any], str] = {
    str: "string",
    list: "list",
    dict: "struct",
    bool: "bool",
    int: "int64",
    float: "double",
}


@runtime_checkable
class Records(Protocol):
    """Rows, read by their number from any thread."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The wanted columns of a row."""
        ...

    def where(self, index: int) -> str:
        """File and row, for a message."""
        ...


def open_records(where: str | Path, columns: Mapping[str, type[Any]], *, split: str = "train") -> Records:
    """The rows of a file, or of a directory's files in the order of their names.

    Args:
        where: a path, or a `file://`, `gs://`, `s3://` or `az://` URI, of a `.txt` (one row: "text" is all of it),
            `.jsonl`, `.parquet` or Arrow file; or of a directory of files of one of these kinds, such as those that
            the `datasets` library saves and those that its hub has.
        columns: those wanted, and what each of their values has to be: str, list, dict, bool, int or float.
        split: of a directory that has several.

    Raises:
        DataError: if there are no rows, one is damaged, or lacks a column; says the file, the row, and what is there.
        CheckpointError: if an object store cannot be read.
    """
    path = fetch_files(str(where), DATA_FILES, progress=True)
    files = [path] if path.is_file() else _find_files(path, split)
    parts = [_open_file(file, columns) for file in files]
    return parts[0] if len(parts) == 1 else _Joined(parts)


def _find_files(directory: Path, split: str) -> list[Path]:
    declared = directory / "dataset_dict.json"
    if declared.exists():
        splits: list[str] = json.loads(declared.read_text(encoding="utf-8")).get("splits", [])
        if split not in splits:
            raise DataError(f"{directory} has no split {split!r}; it has {', '.join(splits)}")
        directory = directory / split
    found = {suffix: sorted(directory.rglob(f"*{suffix}")) for suffix in _SUFFIXES}
    kinds = [suffix for suffix in _SUFFIXES if found[suffix]]
    if len(kinds) != 1:
        has = f"files of {len(kinds)} kinds, {', '.join(kinds)}; pass one file" if kinds else "no data"
        raise DataError(f"{directory} has {has} (of the kinds {', '.join(_SUFFIXES)})")
    files = [file for file in found[kinds[0]] if not file.name.startswith("cache-")]
    return _of_split(files, directory, split)


def _of_split(files: Sequence[Path], directory: Path, split: str) -> list[Path]:
    """The files of a split where names or folders tell them: train-00000-of-00002.parquet, or train/0.parquet."""
    known = ("train", "test", "validation", "valid", "dev")
    of: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(directory).parts
        names = {*parts[:-1], file.name.partition("-")[0].partition(".")[0]}
        of.setdefault(next((name for name in (split, *known) if name in names), split), []).append(file)
    if split not in of:
        raise DataError(f"{directory} has no split {split!r}; it has {', '.join(sorted(of))}")
    return of[split]


def _open_file(file: Path, columns: Mapping[str, type[Any]]) -> Records:
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty; remove it, or put data into it")
    match file.suffix:
        case ".txt":
            return _TextFile(file, columns)
        case ".jsonl":
            return _JsonLines(file, columns)
        case ".parquet":
            return _ArrowRows(_unpack_parquet(file, columns), columns, shown=file)
        case ".arrow":
            return _ArrowRows(file, columns, shown=file)
        case _:
            raise DataError(f"{file} must be one of {', '.join(_SUFFIXES)}; convert it")


def _missing_column(where: str, column: str, there: Iterable[str]) -> DataError:
    return DataError(f"{where} has no column {column!r}; it has {', '.join(sorted(there)) or 'none'}. Name another one")


def _name_of(value: Any) -> str:
    return type(value).__name__


def _arrow() -> Any:
    """pyarrow, an extra; it has no types."""
    import pyarrow  # noqa: PLC0415  # pyright: ignore[reportMissingTypeStubs]
    import pyarrow.parquet  # noqa: PLC0415  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]

    return pyarrow


class _Joined:
    """Several files as one."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[Records, int]:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part], index - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part, i = self._place(index)
        return part[i]

    def where(self, index: int) -> str:
        part, i = self._place(index)
        return part.where(i)


class _TextFile:
    """A file of text, which is one row."""

    def __init__(self, file: Path, columns: Mapping[str, type[Any]]) -> None:
        for column in columns:
            if column != "text":
                raise _missing_column(str(file), column, ["text"])
        try:
            self._text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8: {error.reason} at byte {error.start}; convert it") from None
        self._file = file

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"text": self._text}

    def where(self, index: int) -> str:
        return str(self._file)


class _JsonLines:
    """An object per line. Blank lines are no rows."""

    def __init__(self, file: Path, columns: Mapping[str, type[Any]]) -> None:
        self._file, self._columns = file, columns
        with file.open("rb") as opened:
            self._bytes = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        starts: list[int] = []
        lines: list[int] = []
        start = 0
        for number, line in enumerate(iter(self._bytes.readline, b""), start=1):
            if line.strip():
                self._check(line, number)
                starts.append(start)
                lines.append(number)
            start += len(line)
        if not starts:
            raise DataError(f"{file} has only blank lines; put an object with {', '.join(columns)} on each")
        self._starts = np.asarray([*starts, len(self._bytes)], np.int64)
        self._lines = np.asarray(lines, np.int64)

    def _check(self, line: bytes, number: int) -> None:
        at = f"{self._file}, line {number}"
        try:
            value: Any = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise DataError(f"{at} is not valid JSON: {error}. Correct or remove the line") from None
        if not isinstance(value, dict):
            raise DataError(f"{at} must be an object with {', '.join(self._columns)}; it is {_name_of(value)}")
        row = cast(dict[str, Any], value)
        for column, kind in self._columns.items():
            if column not in row:
                raise _missing_column(at, column, row)
            if not isinstance(row[column], kind):
                raise DataError(f"{at}: {column!r} must be a {_KINDS[kind]}; it is {_name_of(row[column])}")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        row = orjson.loads(self._bytes[self._starts[index] : self._starts[index + 1]])
        return {column: row[column] for column in self._columns}

    def where(self, index: int) -> str:
        return f"{self._file}, line {self._lines[index]}"


class _ArrowRows:
    """An Arrow file, mapped into memory, in either of its formats."""

    def __init__(self, file: Path, columns: Mapping[str, type[Any]], *, shown: Path) -> None:
        pa = _arrow()
        self._shown = shown
        mapped = pa.memory_map(str(file))
        try:
            try:
                table = pa.ipc.open_stream(mapped).read_all()
            except pa.ArrowInvalid:
                table = pa.ipc.open_file(mapped).read_all()
        except pa.ArrowInvalid as error:
            raise DataError(f"{shown} is damaged or no Arrow file: {error}") from None
        _check_schema(shown, table.schema, columns)
        self._batches: list[Any] = table.select(list(columns)).to_batches()
        self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        self._columns = list(columns)
        if not self._ends or not self._ends[-1]:
            raise DataError(f"{shown} has no rows")
        for column in columns:
            self._refuse_nulls(column)

    def _refuse_nulls(self, column: str) -> None:
        for start, batch in zip([0, *self._ends], self._batches, strict=False):
            values = batch.column(column)
            if values.null_count:
                row = start + values.is_null().to_pylist().index(True)
                raise DataError(f"{self._shown}, row {row}: {column!r} is missing. Fill it, or remove the row")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        part = bisect.bisect_right(self._ends, index)
        i = index - (self._ends[part - 1] if part else 0)
        return {column: self._batches[part].column(column)[i].as_py() for column in self._columns}

    def where(self, index: int) -> str:
        return f"{self._shown}, row {index}"


def _check_schema(shown: Path, schema: Any, columns: Mapping[str, type[Any]]) -> None:
    pa = _arrow()
    fits: dict[type[Any], Callable[[Any], bool]] = {
        str: lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
        list: lambda t: pa.types.is_list(t) or pa.types.is_large_list(t),
        dict: pa.types.is_struct,
        bool: pa.types.is_boolean,
        int: pa.types.is_integer,
        float: pa.types.is_floating,
    }
    for column, kind in columns.items():
        if column not in schema.names:
            raise _missing_column(str(shown), column, schema.names)
        found = schema.field(column).type
        if not fits[kind](found):
            raise DataError(f"{shown}: the column {column!r} must be {_KINDS[kind]}; it is {found}")


def _unpack_parquet(file: Path, columns: Mapping[str, type[Any]]) -> Path:
    """The wanted columns as an Arrow file in the cache, made unless it is there; Parquet has no cheap random access."""
    pa = _arrow()
    status = file.stat()
    version = repr((str(file.absolute()), status.st_size, status.st_mtime_ns, sorted(columns)))
    unpacked = cache_dir() / "records" / f"{file.stem}-{hashlib.sha256(version.encode()).hexdigest()[:16]}.arrow"
    with suppress(FileNotFoundError):
        unpacked.stat()
        return unpacked
    try:
        with pa.parquet.ParquetFile(file) as packed:
            schema = packed.schema_arrow
            _check_schema(file, schema, columns)
            unpacked.parent.mkdir(parents=True, exist_ok=True)
            wanted = pa.schema([schema.field(column) for column in columns])
            with atomic_write(unpacked) as target, pa.ipc.new_stream(target, wanted) as writer:
                for batch in packed.iter_batches(columns=list(columns)):
                    writer.write_batch(batch.select(list(columns)))
    except pa.ArrowInvalid as error:
        raise DataError(f"{file} is damaged or no Parquet file: {error}") from None
    return unpacked
