"""Batches: full of tokens, whole documents, the same every time, and resumed exactly."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from tenfold.base.errors import ConfigError, DataError
from tenfold.data.packing import Example, Rows
from tenfold.data.tokenizer import Tokenizer
from tenfold.testing.byte_tokenizer import BOS, BOS_ID, EOS, EOS_ID, byte_tokenizer
from tenfold.train.batches import Batches, Source, encode_text, fill, first_batches, packed_batches

LENGTH = 32


class Numbered:
    """Rows whose text is their number, over and over, of lengths that vary."""

    def __init__(self, count: int, first: int = 0) -> None:
        self._count, self._first = count, first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"number": self._first + index, "length": 2 + (index * 7) % (LENGTH - 1)}

    def where(self, index: int) -> str:
        return f"numbers, row {index}"


def encode(row: Mapping[str, Any]) -> Sequence[Example]:
    return [([row["number"]] * row["length"], [True] * row["length"])]


def numbers(count: int = 40, first: int = 0, *, name: str = "numbers", weight: float = 1.0) -> Source:
    return Source(name=name, records=Numbered(count, first), encode=encode, weight=weight)


def batches(*sources: Source, seed: int = 0, share: tuple[int, int] = (0, 1)) -> Batches:
    return packed_batches(sources, rows=4, length=LENGTH, seed=seed, pad_id=0, share=share)


def take(found: Batches, count: int) -> list[Rows]:
    return [next(found) for _ in range(count)]


def assert_same(found: Sequence[Rows], wanted: Sequence[Rows]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def documents(rows: Sequence[Rows]) -> list[tuple[int, int]]:
    """(token, length) of every segment."""
    found = []
    for batch in rows:
        for tokens, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            for segment in range(1, segments.max() + 1):
                members = tokens[segments == segment]
                assert len(set(members.tolist())) == 1
                found.append((int(members[0]), len(members)))
    return found


def test_rows_are_nearly_full_of_whole_documents() -> None:
    rows = take(batches(numbers(1000)), 100)
    assert fill(iter(rows)) >= 0.95
    lengths = {number: Numbered(1000)[number]["length"] for number in range(1000)}
    assert all(lengths[number] == length for number, length in documents(rows))


def test_the_same_arguments_give_the_same_batches_and_other_seeds_others() -> None:
    first = take(batches(numbers(), numbers(20, 100, name="b")), 80)
    assert_same(take(batches(numbers(), numbers(20, 100, name="b")), 80), first)
    other = take(batches(numbers(), numbers(20, 100, name="b"), seed=1), 1)
    assert (other[0].tokens != first[0].tokens).any()


@pytest.mark.parametrize(
    "done", [1, 64, 70, *(pytest.param(done, marks=pytest.mark.slow) for done in (0, 63, 65))]
)  # a window of 256 rows is 64 batches
def test_a_restored_iterator_goes_on_where_the_other_stood(done: int) -> None:
    sources = numbers(), numbers(20, 100, name="b", weight=0.5)
    original = batches(*sources)
    take(original, done)
    state = json.loads(json.dumps(original.get_state()))
    wanted = take(original, 10)
    restored = batches(*sources)
    take(restored, 3)
    restored.set_state(state)
    assert_same(take(restored, 10), wanted)


def first_window(*sources: Source, share: tuple[int, int] = (0, 1)) -> list[Rows]:
    """The rows that are packed together first."""
    found = packed_batches(sources, rows=1, length=LENGTH, seed=0, share=share)
    rows: list[Rows] = []
    while True:
        row = next(found)
        if found.get_state()["window"]:
            return rows
        rows.append(row)


def test_every_epoch_has_every_document_once_in_another_order() -> None:
    found = [number for number, _ in documents(first_window(numbers(40)))]  # several epochs
    times = [found.count(number) for number in range(40)]
    assert min(times) > 5 and max(times) - min(times) <= 1


def test_weights_are_shares_of_the_rows() -> None:
    rows = take(batches(numbers(40, 1, weight=3.0), numbers(40, 1001, name="b")), 50)
    tokens = np.concatenate([batch.tokens for batch in rows])
    assert (tokens.max(1) > 1000).mean() == pytest.approx(0.25, abs=0.01)


def test_processes_read_different_documents() -> None:
    parts = [{n for n, _ in documents(first_window(numbers(4000), share=(i, 2)))} for i in range(2)]
    assert min(map(len, parts)) > 300  # each less than an epoch's share of a process
    assert not parts[0] & parts[1]


def test_what_is_held_out_is_each_document_once() -> None:
    found = first_batches(numbers(40), rows=4, length=LENGTH, count=100)
    wanted = [(number, Numbered(40)[number]["length"]) for number in range(40)]
    assert sorted(documents(found)) == [(number, length) for number, length in wanted]
    assert all(batch.tokens.shape == (4, LENGTH) for batch in found)
    few = first_batches(numbers(40), rows=4, length=LENGTH, count=2)
    assert len(few) == 2 and fill(iter(few)) > 0.9
    parts = [first_batches(numbers(41, 1), rows=1, length=LENGTH, count=40, share=(i, 2)) for i in range(2)]
    assert [len(part) for part in parts] == [40, 40]
    assert sorted(n for part in parts for n, _ in documents(part)) == list(range(1, 42))


def test_long_documents_are_cut_and_begin_and_end_as_the_tokenizer_has_it() -> None:
    tokenizer = Tokenizer(byte_tokenizer(), special_tokens={"bos_token": BOS, "eos_token": EOS})
    pieces = encode_text(tokenizer, 5)({"text": "abcdefg"})
    assert [ids for ids, _ in pieces] == [[BOS_ID, *b"abcd"], [BOS_ID, *b"efg", EOS_ID]]
    assert encode_text(tokenizer, 5)({"text": " \n"}) == []


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(ConfigError, match="weight above 0"):
        batches(numbers(weight=0.0))
    with pytest.raises(ConfigError, match="different names: numbers, numbers"):
        batches(numbers(), numbers())
    with pytest.raises(DataError, match="3 rows, too few for 4 shares"):
        batches(numbers(3), share=(0, 4))


def test_an_error_says_which_row_it_is_of() -> None:
    def refuse(row: Mapping[str, Any]) -> Sequence[Example]:
        raise DataError("no")

    with pytest.raises(DataError, match=r"numbers, row \d+: no"):
        next(batches(Source(name="a", records=Numbered(5), encode=refuse)))
