"""Rows of data out of files that other libraries wrote, and what is refused before a row is used."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.errors import DataError
from tenfold.data.records import Records, open_records

TEXTS = ["one", "zwei\nzeilen", "три", ""]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENFOLD_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def texts(records: Records) -> list[str]:
    return [records[i]["text"] for i in range(len(records))]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_arrow(path: Path, table: pa.Table) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def table(values: list[Any] = TEXTS) -> pa.Table:
    return pa.table({"id": list(range(len(values))), "text": values})


def test_every_format_has_the_same_rows(tmp_path: Path) -> None:
    files = [
        write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": i} for i, text in enumerate(TEXTS)]),
        write_arrow(tmp_path / "a.arrow", table()),
        tmp_path / "a.parquet",
    ]
    pq.write_table(table(), files[2], row_group_size=3)
    for file in files:
        assert texts(open_records(file, {"text": str})) == TEXTS
        assert texts(open_records(file.as_uri(), {"text": str})) == TEXTS
        assert open_records(file, {"id": int})[1] == {"id": 1}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_lines_are_found_wherever_they_are(tmp_path_factory: pytest.TempPathFactory, found: list[str]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ["", *found]]
    path.write_text("\n\n".join(lines), encoding="utf-8", newline="\n")  # blank lines between, no end of the last line
    records = open_records(path, {"text": str})
    assert texts(records) == ["", *found]
    assert records.where(len(found)) == f"{path}, line {2 * len(found) + 1}"


def test_a_directory_is_its_files_in_order(tmp_path: Path) -> None:
    for name, text in (("b", "second"), ("a", "first"), ("c", "third")):
        (tmp_path / f"{name}.txt").write_text(text)
    records = open_records(tmp_path, {"text": str})
    assert texts(records) == ["first", "second", "third"]
    assert records.where(1) == str(tmp_path / "b.txt")


def test_what_the_datasets_library_saves(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split, values in (("train", TEXTS), ("test", ["held out"])):
        (tmp_path / split).mkdir()
        write_arrow(tmp_path / split / "data-00000-of-00001.arrow", table(values))
        (tmp_path / split / "state.json").write_text("{}")
    assert texts(open_records(tmp_path, {"text": str})) == TEXTS
    assert texts(open_records(tmp_path, {"text": str}, split="test")) == ["held out"]
    assert texts(open_records(tmp_path / "test", {"text": str})) == ["held out"]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        open_records(tmp_path, {"text": str}, split="dev")


def test_what_the_hub_has(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, value in (("train-00001-of-00002", "b"), ("train-00000-of-00002", "a"), ("test-00000-of-00001", "c")):
        pq.write_table(table([value]), tmp_path / "data" / f"{name}.parquet")
    assert texts(open_records(tmp_path, {"text": str})) == ["a", "b"]
    assert texts(open_records(tmp_path, {"text": str}, split="test")) == ["c"]


def test_parquet_is_unpacked_once_and_again_when_it_changes(tmp_path: Path) -> None:
    import os

    path = tmp_path / "a.parquet"
    pq.write_table(table(["old"]), path)
    assert texts(open_records(path, {"text": str})) == ["old"]
    pq.write_table(table(["new"]), path)
    os.utime(path, ns=(1, 1))
    assert texts(open_records(path, {"text": str})) == ["new"]


BAD_LINES = [
    ('{"text": "a"}\n{"text": "b"\n', "line 2 is not valid JSON"),
    ('{"text": "a"}\n\n["b"]\n', "line 3 must be an object with text; it is list"),
    ('{"text": "a"}\n{"body": "b", "id": 1}\n', "line 2 has no column 'text'; it has body, id"),
    ('{"text": "a"}\n{"text": 5}\n', "line 2: 'text' must be a string; it is int"),
    ("\n \n", "only blank lines"),
    ("", "is empty"),
]


@pytest.mark.parametrize(("content", "message"), BAD_LINES)
def test_a_bad_line_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        open_records(path, {"text": str})
    assert str(path) in str(caught.value)


def test_a_bad_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(["a", "b", None, "d"]), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: 'text' is missing"):
        open_records(path, {"text": str})
    with pytest.raises(DataError, match="no column 'body'; it has id, text"):
        open_records(path, {"body": str})
    with pytest.raises(DataError, match="'id' must be string; it is int64"):
        open_records(path, {"id": str})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="is damaged or no Parquet file"):
        open_records(path, {"text": str})
    (tmp_path / "b.arrow").write_bytes(b"ARROW nothing")
    with pytest.raises(DataError, match="is damaged or no Arrow file"):
        open_records(tmp_path / "b.arrow", {"text": str})


def test_a_place_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("none")
    with pytest.raises(DataError, match="has no data"):
        open_records(tmp_path, {"text": str})
    with pytest.raises(DataError, match=r"must be one of \.txt, \.jsonl"):
        open_records(tmp_path / "notes.md", {"text": str})
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        open_records(tmp_path, {"text": str})
