"""Our reader and writer against the safetensors library, and against damaged files."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tenfold.base.errors import CheckpointError
from tenfold.nn import safetensors as ours
from tenfold.nn.safetensors import DTYPES, Deferred

IN_TMP = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

# What the library's own numpy path reads and writes correctly.
SHARED_DTYPES = ["BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64"]


@st.composite
def arrays(draw: st.DrawFn, names: list[str]) -> np.ndarray:
    dtype = DTYPES[draw(st.sampled_from(names))]
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8)
    raw = raw % 2 if dtype == np.bool_ else raw
    return raw.copy().view(dtype).reshape(shape)


def tensors(names: list[str]) -> st.SearchStrategy[dict[str, np.ndarray]]:
    return st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), arrays(names))


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


@given(written=tensors(list(DTYPES)))
@IN_TMP
def test_what_is_written_is_read(tmp_path: Path, written: dict[str, np.ndarray]) -> None:
    ours.write(tmp_path / "a.safetensors", written)
    file = ours.open(tmp_path / "a.safetensors")
    assert set(file) == set(written)
    assert len(file) == len(written)
    for name, array in written.items():
        assert_same(file[name], array)
        assert not (array.size and file[name].flags.writeable)
        assert file[name].flags.aligned


@given(written=tensors(SHARED_DTYPES))
@IN_TMP
def test_the_library_reads_what_we_write(tmp_path: Path, written: dict[str, np.ndarray]) -> None:
    ours.write(tmp_path / "a.safetensors", written)
    read = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert set(read) == set(written)
    for name, array in written.items():
        assert_same(read[name], array)


@given(written=tensors(SHARED_DTYPES))
@IN_TMP
def test_we_read_what_the_library_writes(tmp_path: Path, written: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(written, tmp_path / "a.safetensors", metadata={"made": "elsewhere"})
    file = ours.open(tmp_path / "a.safetensors")
    assert file.metadata == {"made": "elsewhere"}
    for name, array in written.items():
        assert_same(file[name], array)


@pytest.mark.parametrize(("name", "bits"), [("BF16", "80 3f 20 c0"), ("F8_E4M3", "38 c2"), ("F8_E5M2", "3c c1")])
def test_narrow_floats_mean_what_their_formats_say(tmp_path: Path, name: str, bits: str) -> None:
    data = bytes.fromhex(bits)
    header = json.dumps({"x": {"dtype": name, "shape": [2], "data_offsets": [0, len(data)]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    expected = {"BF16": [1.0, -2.5], "F8_E4M3": [1.0, -2.5], "F8_E5M2": [1.0, -2.5]}[name]
    assert ours.open(tmp_path / "a.safetensors")["x"].astype(np.float32).tolist() == expected


def test_a_strided_array_is_written_in_c_order(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    ours.write(tmp_path / "a.safetensors", {"x": array})
    assert_same(ours.open(tmp_path / "a.safetensors")["x"], array.copy())


def test_deferred_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    class Counted(np.ndarray):
        def __del__(self) -> None:
            if self.base is None:
                alive.pop()

    def make() -> np.ndarray:
        assert not alive
        alive.append(1)
        return np.ndarray.__new__(Counted, (1000,), np.float32)

    deferred = {f"t{i}": Deferred(np.dtype(np.float32), (1000,), make) for i in range(4)}
    ours.write(tmp_path / "a.safetensors", deferred)
    assert len(ours.open(tmp_path / "a.safetensors")) == 4


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    ours.write(path, {"x": np.ones(3, np.float32)})
    wrong = {"x": Deferred(np.dtype(np.float32), (3,), lambda: np.ones(4, np.float32))}
    with pytest.raises(ValueError, match=r"x: announced as float32 \(3,\), made as float32 \(4,\)"):
        ours.write(path, wrong)
    assert ours.open(path)["x"].tolist() == [1, 1, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'x' has the dtype int4"):
        ours.write(tmp_path / "a.safetensors", {"x": np.zeros(2, ml_dtypes.int4)})
    assert not list(tmp_path.iterdir())


# --- damaged files --------------------------------------------------------------------------------------------------


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


DAMAGED = {
    "empty file": (b"", "truncated within its header"),
    "cut in the length": (b"\1\0\0", "truncated within its header"),
    "cut in the header": (file_of({"x": entry()})[:20], "truncated within its header"),
    "absurd length": (b"\xff" * 8 + b"{}", "is not a safetensors file: its header would be"),
    "a pickle": (b"\x80\x02}q\x00(X\x05\x00\x00\x00" + bytes(100), "is not a safetensors file"),
    "not JSON": (file_of(b"{x}", b""), "bad header"),
    "not UTF-8": (file_of(b'{"\xff":1}', b""), "bad header"),
    "deep JSON": (file_of(b"[" * 100_000, b""), "bad header"),
    "not an object": (file_of([1]), "not a JSON object"),
    "twice the same name": (
        file_of(b'{"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"x":1}'),
        "the key 'x' stands there twice",
    ),
    "entry of another kind": (file_of({"x": [1]}), "entry of 'x' is not a dtype"),
    "negative dim": (file_of({"x": entry(shape=[-2])}), "entry of 'x' is not a dtype"),
    "fractional dim": (file_of({"x": entry(shape=[2.0])}), "entry of 'x' is not a dtype"),
    "boolean dim": (file_of({"x": entry(shape=[True, 2])}), "entry of 'x' is not a dtype"),
    "three offsets": (file_of({"x": entry(offsets=[0, 4, 8])}), "entry of 'x' is not a dtype"),
    "too many dims": (file_of({"x": entry(shape=[1] * 99 + [2])}), "'x' has the impossible shape"),
    "huge dims": (file_of({"x": entry(shape=[0, 2**61, 2**61], offsets=[0, 0])}), "'x' has the impossible shape"),
    "unknown dtype": (file_of({"x": entry("F4")}), "'x' has the dtype 'F4', which is not supported"),
    "shape and bytes differ": (file_of({"x": entry(shape=[3])}), r"'x' of shape \[3\] and dtype F32 takes 12 bytes"),
    "reversed offsets": (file_of({"x": entry(shape=[0], offsets=[8, 0])}), "header gives it -8"),
    "starts late": (file_of({"x": entry(offsets=[4, 12])}, bytes(12)), "'x' leaves a gap"),
    "overlap": (
        file_of({"x": entry(), "y": entry(offsets=[4, 12])}, bytes(12)),
        "'y' overlaps the tensor before it",
    ),
    "truncated data": (file_of({"x": entry()}, bytes(7)), "is truncated: the tensor 'x' ends at byte"),
    "trailing data": (file_of({"x": entry()}, bytes(9)), "1 bytes after the last tensor"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "metadata of another kind": (file_of({"__metadata__": []}, b""), "__metadata__"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as raised:
        ours.open(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.safetensors"
    if kind == "directory":
        path.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ours.open(path)


def test_a_file_without_tensors_is_valid(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(file_of({}, b""))
    assert dict(ours.open(tmp_path / "a.safetensors")) == {}


@st.composite
def corrupted(draw: st.DrawFn) -> bytes:
    header = {"a": entry("F32", [2, 3], [0, 24]), "b": entry("BF16", [5], [24, 34]), "__metadata__": {"format": "pt"}}
    content = bytearray(file_of(header, bytes(range(34))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["replace", "insert", "delete", "cut"]))
        if kind == "cut":
            content = content[:at]
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 12))]
        else:
            # digits and brackets reach past the JSON parser more often than any other byte
            new = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"0", b"9", b"-", b"]", b"1e9", b'"']))
            content[at : at + (len(new) if kind == "replace" else 0)] = new
    return bytes(content)


@given(content=corrupted() | st.binary(max_size=64))
@settings(parent=IN_TMP, max_examples=800)
def test_any_corruption_is_an_error_or_a_valid_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    try:
        file = ours.open(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        return
    start = 8 + int.from_bytes(content[:8], "little")
    assert sum(array.nbytes for array in file.values()) == len(content) - start
    for name, array in file.items():
        assert array.shape == file.infos[name].shape
        assert array.tobytes() == content[file.infos[name].offset :][: array.nbytes]
