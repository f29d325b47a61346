"""Our reader and writer against the reader and writer of the package `gguf`, and against damaged files."""

import struct
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf as library
import ml_dtypes
import numpy as np
import pytest
from gguf import quants
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tenfold.base import ggml_blocks
from tenfold.base import gguf as ours
from tenfold.base.errors import CheckpointError
from tenfold.base.ggml_blocks import FLOATS, GGMLType
from tenfold.base.gguf import Deferred

IN_TMP = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64]


def metadata_values() -> st.SearchStrategy[Any]:
    typed = st.sampled_from(SCALARS).flatmap(
        lambda dtype: st.one_of(
            hnp.from_dtype(np.dtype(dtype), allow_nan=False),
            hnp.arrays(dtype, st.integers(0, 4), elements={"allow_nan": False} if dtype in SCALARS[8:] else None),
        )
    )
    return st.one_of(typed, st.booleans(), st.text(max_size=20), st.lists(st.text(max_size=5), max_size=4))


def metadata() -> st.SearchStrategy[dict[str, Any]]:
    keys = st.from_regex(r"[a-z_]{1,8}(\.[a-z_]{1,8}){0,2}", fullmatch=True).filter(lambda key: "general" not in key)
    return st.dictionaries(keys.filter(lambda key: "split" not in key), metadata_values(), max_size=5)


@st.composite
def float_arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from(list(FLOATS.values())))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random.normal(size=shape).astype(dtype)


def tensors() -> st.SearchStrategy[dict[str, np.ndarray]]:
    return st.dictionaries(st.text("abc.", min_size=1, max_size=8), float_arrays(), max_size=4)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()
    else:
        assert found == expected
        assert type(found) is type(expected.item() if isinstance(expected, np.generic) else expected)


@given(meta=metadata(), written=tensors())
@example(meta={"": "", "é": ["", "日本"]}, written={})
@settings(IN_TMP, max_examples=50)
def test_what_is_written_is_read(tmp_path: Path, meta: dict[str, Any], written: dict[str, np.ndarray]) -> None:
    ours.write(tmp_path / "a.gguf", meta, written)
    file = ours.open(tmp_path / "a.gguf")
    assert list(file) == list(written)
    assert len(file) == len(written)
    assert list(file.metadata) == list(meta)
    for key, value in meta.items():
        assert_same(file.metadata[key], value)
    for name, array in written.items():
        assert file.infos[name].shape == array.shape
        assert_same(file[name], array)
        assert not file[name].flags.writeable
        assert file[name].flags.aligned
        assert_same(file.dequantize(name), array.astype(np.float32))


def flat(field: library.ReaderField) -> Any:
    """A field as the library read it, arrays of numbers as lists."""
    return field.contents()


@given(meta=metadata(), written=tensors())
@settings(IN_TMP, max_examples=50)
def test_the_library_reads_what_we_write(tmp_path: Path, meta: dict[str, Any], written: dict[str, np.ndarray]) -> None:
    ours.write(tmp_path / "a.gguf", meta, written)
    reader = library.GGUFReader(tmp_path / "a.gguf")
    for key, value in meta.items():
        if not isinstance(value, list | np.ndarray) or len(value):  # the library loses the type of an empty array
            plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
            found = flat(reader.fields[key])
            assert found == plain
    assert {tensor.name for tensor in reader.tensors} == set(written)
    for tensor in reader.tensors:
        array = written[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == array.shape
        assert tensor.tensor_type.name == {v: k for k, v in FLOATS.items()}[array.dtype].name
        assert np.asarray(tensor.data).tobytes() == array.tobytes()


ADD = {
    np.uint8: "add_uint8",
    np.int8: "add_int8",
    np.uint16: "add_uint16",
    np.int16: "add_int16",
    np.uint32: "add_uint32",
    np.int32: "add_int32",
    np.uint64: "add_uint64",
    np.int64: "add_int64",
    np.float32: "add_float32",
    np.float64: "add_float64",
}


def write_with_library(path: Path, *, alignment: int | None = None, split: int = 0) -> dict[str, np.ndarray]:
    """One value of every type and one tensor of every type, and what the tensors are in float32."""
    writer = library.GGUFWriter(path, "llama", split_max_tensors=split)
    if alignment:
        writer.add_custom_alignment(alignment)
    for dtype, add in ADD.items():
        getattr(writer, add)(f"one.{dtype.__name__}", -3 if np.dtype(dtype).kind in "if" else 200)
    writer.add_bool("one.bool", True)
    writer.add_string("one.string", "Größe")
    writer.add_array("many.string", ["a", "", "日本"])
    writer.add_array("many.int", [1, -2, 3])
    writer.add_array("many.float", [0.5, 1.5])
    writer.add_array("many.bool", [True, False, True])
    random = np.random.default_rng(5)
    expected: dict[str, np.ndarray] = {}
    for kind in GGMLType:
        name, there = f"{kind.name}.weight", library.GGMLQuantizationType(int(kind))
        if kind in (GGMLType.F32, GGMLType.F16):
            array = random.normal(size=(3, 256)).astype(FLOATS[kind])
            writer.add_tensor(name, array)
            expected[name] = array.astype(np.float32)
            continue
        raw = random.integers(0, 120, (3, ggml_blocks.row_size(kind, 256)), np.uint8)  # without NaN
        writer.add_tensor(name, raw, raw_dtype=there)
        expected[name] = quants.dequantize(raw, there)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_we_read_what_the_library_writes(tmp_path: Path, alignment: int | None) -> None:
    expected = write_with_library(tmp_path / "a.gguf", alignment=alignment)
    file = ours.open(tmp_path / "a.gguf")
    for dtype in ADD:
        assert file.metadata[f"one.{dtype.__name__}"] == (-3 if np.dtype(dtype).kind in "if" else 200)
    assert file.metadata["one.bool"] is True
    assert file.metadata["one.string"] == "Größe"
    assert file.metadata["many.string"] == ["a", "", "日本"]
    assert file.metadata["many.int"].tolist() == [1, -2, 3]
    assert file.metadata["many.float"].tolist() == [0.5, 1.5]
    assert file.metadata["many.bool"].tolist() == [True, False, True]
    assert set(file) == set(expected)
    for name, array in expected.items():
        info = file.infos[name]
        assert info.shape == (3, 256)
        assert f"{info.type.name}.weight" == name
        assert file[name].shape == info.raw_shape
        assert_same(file.dequantize(name), array)


def test_version_2_is_the_same_layout(tmp_path: Path) -> None:
    expected = write_with_library(tmp_path / "a.gguf")
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    data[4:8] = struct.pack("<I", 2)
    (tmp_path / "b.gguf").write_bytes(data)
    assert_same(ours.open(tmp_path / "b.gguf").dequantize("Q6_K.weight"), expected["Q6_K.weight"])


def test_nested_arrays_are_lists(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", 4, 2) + struct.pack("<II", 7, 8)
    value = struct.pack("<IQ", 9, 2) + inner + struct.pack("<IQ", 8, 1) + text("x")
    (tmp_path / "a.gguf").write_bytes(header(pairs=[text("k") + struct.pack("<I", 9) + value]))
    first, second = ours.open(tmp_path / "a.gguf").metadata["k"]
    assert first.tolist() == [7, 8]
    assert second == ["x"]


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q4_0])
def test_deferred_values_are_rounded(tmp_path: Path, kind: GGMLType) -> None:
    values = np.random.default_rng(2).normal(size=(4, 64)).astype(np.float32)
    ours.write(tmp_path / "a.gguf", {}, {"x": Deferred(kind, (4, 64), lambda: values)})
    tensor = library.GGUFReader(tmp_path / "a.gguf").tensors[0]
    wanted = quants.quantize(values, library.GGMLQuantizationType(int(kind)))
    np.testing.assert_array_equal(np.asarray(tensor.data).view(np.uint8), wanted.view(np.uint8))


def test_deferred_bytes_are_kept(tmp_path: Path) -> None:
    raw = np.random.default_rng(2).integers(0, 256, (3, 2 * 144), np.uint8)
    ours.write(tmp_path / "a.gguf", {}, {"x": Deferred(GGMLType.Q4_K, (3, 512), lambda: raw)})
    file = ours.open(tmp_path / "a.gguf")
    assert file.infos["x"].shape == (3, 512)
    assert_same(file["x"], raw)


def test_deferred_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted(np.ndarray):
        def __del__(self) -> None:
            if self.base is None:
                alive.pop()

    def make() -> np.ndarray:
        assert not alive
        alive.append(1)
        return np.ndarray.__new__(Counted, (1024,), np.float32)

    deferred = {f"t{i}": Deferred(GGMLType.F32, (1024,), make) for i in range(4)}
    ours.write(tmp_path / "a.gguf", {}, deferred)
    assert len(ours.open(tmp_path / "a.gguf")) == 4


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    ours.write(path, {}, {"x": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"x: announced as F32 \(3,\), made as float32 \(4,\)"):
        ours.write(path, {}, {"x": Deferred(GGMLType.F32, (3,), lambda: np.ones(4, np.float32))})
    assert ours.open(path)["x"].tolist() == [1, 1, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("meta", "tensor", "message"),
    [
        ({"k": None}, np.ones(1, np.float32), "the metadata 'k' cannot be written: None"),
        ({"k": [["a"]]}, np.ones(1, np.float32), "the metadata 'k' cannot be written"),
        ({"k": 2**64}, np.ones(1, np.float32), "the metadata 'k' cannot be written"),
        ({"general.alignment": 12}, np.ones(1, np.float32), "general.alignment is 12, not a multiple of 8"),
        ({}, np.ones(1, np.float64), "'x' has the dtype float64, which GGUF cannot hold as it is"),
        ({}, Deferred(GGMLType.Q4_0, (2, 48), lambda: np.ones((2, 48))), "cannot be Q4_0, in blocks of 32 weights"),
    ],
)
def test_what_the_format_lacks_is_refused(
    tmp_path: Path, meta: dict[str, Any], tensor: np.ndarray | Deferred, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        ours.write(tmp_path / "a.gguf", meta, {"x": tensor})
    assert not list(tmp_path.iterdir())


def test_python_numbers_take_the_usual_types(tmp_path: Path) -> None:
    values = {
        "a": 7,
        "b": -7,
        "c": 2**40,
        "d": 0.1,
        "e": [1, 2],
        "f": [2**32 - 1],
        "g": [-(2**40)],
        "h": [0.5],
        "i": [],
    }
    ours.write(tmp_path / "a.gguf", values, {})
    kinds = {key: field.types[-1].name for key, field in library.GGUFReader(tmp_path / "a.gguf").fields.items()}
    scalars = {"a": "UINT32", "b": "INT32", "c": "UINT64", "d": "FLOAT32"}
    assert kinds.items() >= (scalars | {"e": "INT32", "f": "UINT32", "g": "INT64", "h": "FLOAT32"}).items()


def test_importing_it_loads_no_jax() -> None:
    probe = "import sys; import tenfold.base.gguf; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0


# --- splits ---------------------------------------------------------------------------------------------------------


def write_split(folder: Path) -> tuple[list[Path], dict[str, np.ndarray]]:
    expected = write_with_library(folder / "model.gguf", split=5)
    return sorted(folder.glob("model-*.gguf")), expected


def test_a_split_is_one_model(tmp_path: Path) -> None:
    paths, expected = write_split(tmp_path)
    assert [path.name for path in paths] == [f"model-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for path in paths:  # whichever is named
        file = ours.open(path)
        assert file.path == paths[0]
        assert file.metadata["one.string"] == "Größe"
        assert set(file) == set(expected)
        for name, array in expected.items():
            assert_same(file.dequantize(name), array)
            file.will_need(file[name])
            file.release(file[name])
            assert_same(file.dequantize(name), array)


def test_a_damaged_split_is_refused(tmp_path: Path) -> None:
    paths, _ = write_split(tmp_path)
    first, second, third = (path.read_bytes() for path in paths)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00003.gguf, one of 1 missing of a split into 3"):
        ours.open(paths[0])
    paths[1].write_bytes(third)
    with pytest.raises(
        CheckpointError, match="model-00002-of-00003.gguf is number 2 of 3 by its metadata.* but 1 of 3"
    ):
        ours.open(paths[0])
    paths[1].write_bytes(second.replace(b"Q", b"X", 1))
    assert b"Q3_K.weight" in second
    paths[1].write_bytes(second.replace(b"Q3_K.weight", b"Q4_1.weight"))
    assert b"Q4_1.weight" in first
    with pytest.raises(CheckpointError, match="the tensor 'Q4_1.weight' is in both"):
        ours.open(paths[0])
    paths[1].write_bytes(second)
    (tmp_path / "other.gguf").write_bytes(first)
    with pytest.raises(CheckpointError, match="is one of 3 files, whose names must end in -00001-of-00003.gguf"):
        ours.open(tmp_path / "other.gguf")


def test_a_split_with_another_count_of_tensors_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        meta = {"split.no": np.uint16(number), "split.count": np.uint16(2), "split.tensors.count": np.int32(3)}
        ours.write(tmp_path / f"m-0000{number + 1}-of-00002.gguf", meta, {f"t{number}": np.ones(2, np.float32)})
    with pytest.raises(CheckpointError, match="its split has 3 tensors, but the files have 2"):
        ours.open(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize("value", [np.float32(2.5), "2", np.array([2, 2]), np.int32(-1), np.uint64(2**40), True])
@pytest.mark.parametrize("key", ["split.count", "split.no", "split.tensors.count"])
def test_a_nonsensical_split_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    meta = {"split.no": 0, "split.count": 2, "split.tensors.count": 0} | {key: value}
    for number in (1, 2):
        ours.write(tmp_path / f"m-0000{number}-of-00002.gguf", meta | {"split.no": meta["split.no"]}, {})
    with pytest.raises(CheckpointError):
        ours.open(tmp_path / "m-00001-of-00002.gguf")


# --- damage ---------------------------------------------------------------------------------------------------------


def text(content: str | bytes, length: int | None = None) -> bytes:
    data = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(data) if length is None else length) + data


def info(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(
    *, pairs: list[bytes] | None = None, infos: list[bytes] | None = None, counts: tuple[int, int] | None = None
) -> bytes:
    pairs, infos = pairs or [], infos or []
    tensors, keys = counts or (len(infos), len(pairs))
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(pairs) + b"".join(infos)


def padded(head: bytes, data: int) -> bytes:
    return head + bytes(-len(head) % 32) + bytes(data)


DAMAGED = {
    "empty": (b"", "is truncated within its magic number.*0 bytes"),
    "short magic": (b"GG", "is truncated within its magic number"),
    "another format": (b"GGML" + bytes(60), "is not a GGUF file"),
    "no version": (b"GGUF\x03", "is truncated within its version"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "has the GGUF version 1; supported are 2 and 3"),
    "version 0": (b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "has the GGUF version 0"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
    "no counts": (header()[:-1], "is truncated within its count of metadata"),
    "too many keys": (header(counts=(0, 2**63)), "9223372036854775808 keys of metadata do not fit"),
    "too many tensors": (header(counts=(2**60, 0)), "1152921504606846976 tensors do not fit"),
    "endless key": (header(pairs=[text("k", 2**62) + bytes(32)]), "is truncated within a key of its metadata"),
    "long key": (header(pairs=[text("k" * 70_000) + struct.pack("<II", 4, 1)]), "has 70000 characters"),
    "key in no encoding": (header(pairs=[text(b"\xff") + struct.pack("<II", 4, 1)]), "is not valid UTF-8"),
    "key twice": (header(pairs=[text("k") + struct.pack("<II", 4, 1)] * 2), "have the key 'k' twice"),
    "unknown value type": (header(pairs=[text("k") + struct.pack("<II", 13, 1)]), "'k' has the unknown type 13"),
    "half a value": (header(pairs=[text("k") + struct.pack("<I", 10) + bytes(7)]), "within the metadata 'k'"),
    "endless string": (header(pairs=[text("k") + struct.pack("<I", 8) + text("x", 2**63)]), "within the metadata 'k'"),
    "string in no encoding": (
        header(pairs=[text("k") + struct.pack("<I", 8) + text(b"\xc3")]),
        "the metadata 'k' is not valid UTF-8",
    ),
    "bad boolean": (header(pairs=[text("k") + struct.pack("<IB", 7, 2)]), "has a boolean that is neither 0 nor 1"),
    "array of unknowns": (
        header(pairs=[text("k") + struct.pack("<IIQ", 9, 77, 1) + bytes(8)]),
        "'k' is an array of the unknown type 77",
    ),
    "endless array": (
        header(pairs=[text("k") + struct.pack("<IIQ", 9, 4, 2**61) + bytes(8)]),
        "'k' would have 2305843009213693952 elements",
    ),
    "endless array of strings": (
        header(pairs=[text("k") + struct.pack("<IIQ", 9, 8, 2**40) + bytes(8)]),
        "'k' would have 1099511627776 elements",
    ),
    "arrays without end": (
        header(pairs=[text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50 + struct.pack("<IQ", 4, 0)]),
        "'k' has the unknown type 9 or too many dims",
    ),
    "alignment zero": (
        header(pairs=[text("general.alignment") + struct.pack("<II", 4, 0)]),
        "general.alignment is 0, not a multiple of 8",
    ),
    "alignment not a number": (
        header(pairs=[text("general.alignment") + struct.pack("<I", 8) + text("32")]),
        "general.alignment is '32'",
    ),
    "absurd alignment": (
        header(pairs=[text("general.alignment") + struct.pack("<II", 4, 2**31)]),
        "general.alignment is 2147483648",
    ),
    "endless tensor name": (header(infos=[text("x", 2**50) + bytes(64)]), "is truncated within a tensor's name"),
    "tensor twice": (padded(header(infos=[info("x", [8], 0, 0)] * 2), 64), "the tensor 'x' stands there twice"),
    "too many dims": (padded(header(infos=[info("x", [1] * 5, 0, 0)]), 32), "the tensor 'x' has 5 dims"),
    "absurd dims": (header(infos=[text("x") + struct.pack("<I", 2**31) + bytes(64)]), "'x' has 2147483648 dims"),
    "unsupported type": (
        padded(header(infos=[info("x", [256], 23, 0)]), 256),
        "'x' has the type IQ4_XS, which is not supported: F32, F16",
    ),
    "unknown type": (padded(header(infos=[info("x", [256], 4000, 0)]), 256), "'x' has the type 4000"),
    "half a block": (
        padded(header(infos=[info("x", [48, 2], 2, 0)]), 256),
        r"'x' of shape \[2, 48\] cannot be Q4_0, in blocks of 32 weights",
    ),
    "blocks without a row": (padded(header(infos=[info("x", [], 2, 0)]), 256), "'x' of shape .* cannot be Q4_0"),
    "absurd shape": (padded(header(infos=[info("x", [2**33, 2**33], 0, 0)]), 32), "'x' has the impossible shape"),
    "absurd shape times nothing": (
        padded(header(infos=[info("x", [0, 2**40, 2**40], 0, 0)]), 32),
        "'x' has the impossible shape",
    ),
    "absurd offset": (
        padded(header(infos=[info("x", [8], 0, 2**63)]), 32),
        "'x' has the impossible shape .* or offset",
    ),
    "misaligned": (padded(header(infos=[info("x", [8], 0, 8)]), 64), "'x' begins at 8, which is not aligned to 32"),
    "overlap": (
        padded(header(infos=[info("x", [16], 0, 0), info("y", [8], 0, 32)]), 64),
        "the tensor 'y' overlaps the tensor before it",
    ),
    "same place": (
        padded(header(infos=[info("x", [8], 0, 0), info("y", [8], 0, 0)]), 64),
        "the tensor 'y' overlaps the tensor before it",
    ),
    "gap": (
        padded(header(infos=[info("x", [8], 0, 0), info("y", [8], 0, 64)]), 96),
        "the tensor 'y' leaves a gap before it",
    ),
    "truncated": (padded(header(infos=[info("x", [8], 0, 0)]), 31), "the tensor 'x' ends at byte 96, the file at 95"),
    "no data at all": (header(infos=[info("x", [8], 0, 0)]), "is truncated: the tensor 'x' ends at byte 96"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as raised:
            ours.open(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20 + 8 * len(content)
    finally:
        tracemalloc.stop()
    assert "model.gguf" in str(raised.value)


def test_metadata_beyond_the_budget_are_refused(tmp_path: Path) -> None:
    """A sparse file whose one string would be larger than any header."""
    path = tmp_path / "model.gguf"
    path.write_bytes(header(pairs=[text("k") + struct.pack("<I", 8) + text("", 2**28)]))
    with path.open("r+b") as file:
        file.truncate(2**29)
    with pytest.raises(CheckpointError, match="would have more than 100000000 bytes of metadata"):
        ours.open(path)


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.gguf cannot be read: No such file"):
        ours.open(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory"):
        ours.open(tmp_path)


def test_padding_behind_the_last_tensor_may_lack(tmp_path: Path) -> None:
    head = header(infos=[info("x", [2], 0, 0)])
    (tmp_path / "a.gguf").write_bytes(padded(head, 0) + struct.pack("<ff", 1, 2))
    assert ours.open(tmp_path / "a.gguf")["x"].tolist() == [1, 2]


def test_empty_and_dimless_tensors(tmp_path: Path) -> None:
    head = header(infos=[info("none", [32, 0], 8, 0), info("one", [], 0, 0)])
    (tmp_path / "a.gguf").write_bytes(padded(head, 0) + struct.pack("<f", 3))
    file = ours.open(tmp_path / "a.gguf")
    assert file["none"].shape == (0, 34)
    assert file["one"].shape == ()
    assert file.dequantize("none").shape == (0, 32)
    assert file.dequantize("one") == 3
    file.release(file["none"])
    ours.write(tmp_path / "b.gguf", {}, {name: file[name] for name in ["one"]})
    assert ours.open(tmp_path / "b.gguf")["one"] == 3


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[float, bytes]]:
    """Where in the file, as a share of it, and what stands there instead."""
    interesting = st.sampled_from(
        [b"\0" * 8, b"\xff" * 8, b"\xff" * 4, struct.pack("<Q", 2**40), b"\x7f", b"\x09", b"\x08"]
    )
    return draw(
        st.lists(st.tuples(st.floats(0, 1), st.one_of(interesting, st.binary(min_size=1, max_size=4))), max_size=4)
    )


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small file with every kind of thing, mostly header."""
    path = tmp_path_factory.mktemp("valid") / "a.gguf"
    meta: dict[str, Any] = {f"v.{dtype.__name__}": dtype(3) for dtype in SCALARS}
    meta |= {"general.alignment": 8, "flag": True, "flags": [True, False], "name": "Größe", "names": ["a", "", "日本"]}
    meta |= {"split.count": 1, "ids": [1, 2, 3], "scores": [0.5, 1.5]}
    blocks = {kind.name: Deferred(kind, (1, 256), lambda k=kind: random_row(k)) for kind in list(GGMLType)[2:12:3]}
    ours.write(path, meta, {"f": np.ones((2, 3), np.float32), "h": np.ones(5, ml_dtypes.bfloat16), **blocks})
    return path.read_bytes()


def random_row(kind: GGMLType) -> np.ndarray:
    return np.zeros((1, ggml_blocks.row_size(kind, 256)), np.uint8)


@given(changes=edits(), length=st.one_of(st.just(1.0), st.floats(0, 1)))
@settings(IN_TMP, max_examples=400)
def test_no_damage_does_more_than_raise(
    tmp_path: Path, valid: bytes, changes: list[tuple[float, bytes]], length: float
) -> None:
    """Whatever the bytes, opening raises a CheckpointError, or all arrays lie within the file."""
    data = bytearray(valid)
    for where, what in changes:
        at = int(where * (len(data) - 1))
        data[at : at + len(what)] = what
    data = data[: int(length * len(data))]
    (tmp_path / "a.gguf").write_bytes(data)
    try:
        file = ours.open(tmp_path / "a.gguf")
    except CheckpointError as error:
        assert "a.gguf" in str(error)
        return
    spans = sorted((i.offset, i.offset + i.nbytes) for i in file.infos.values())
    assert all(end <= after for (_, end), (after, _) in pairwise(spans))
    for name in file:
        assert file.infos[name].offset + file.infos[name].nbytes <= len(data)
        assert file[name].nbytes == file.infos[name].nbytes
        with np.errstate(all="ignore"):
            assert file.dequantize(name).shape == file.infos[name].shape
