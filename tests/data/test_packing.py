"""Packing: nothing lost, nothing mixed, nothing wasted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.errors import ConfigError
from tenfold.data.packing import Example, Rows, chunk, pack

LENGTH = 16

tokens = st.integers(1, 50)
example = st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=LENGTH).map(
    lambda pairs: ([token for token, _ in pairs], [spoken for _, spoken in pairs])
)


def unpack(rows: Rows) -> list[Example]:
    """Read the segments back, one token at a time, checking each row on the way."""
    found: list[Example] = []
    for row in range(len(rows.tokens)):
        previous = 0
        for column in range(rows.tokens.shape[1]):
            segment = rows.segment_ids[row, column]
            if segment == 0:
                assert (rows.segment_ids[row, column:] == 0).all()
                break
            if segment != previous:
                assert segment == previous + 1
                found.append(([], []))
                previous = segment
            ids, mask = found[-1]
            assert rows.positions[row, column] == len(ids)
            ids.append(int(rows.tokens[row, column]))
            mask.append(bool(rows.weights[row, column]))
    return found


@given(st.lists(example, max_size=60))
def test_every_example_comes_back_whole(examples: list[Example]) -> None:
    rows = pack(examples, LENGTH, pad_id=0)
    expected = [(ids, [False, *mask[1:]]) for ids, mask in examples]
    assert sorted(unpack(rows)) == sorted(expected)
    padding = rows.segment_ids == 0
    for field in (rows.tokens, rows.positions, rows.weights):
        assert field.shape == (len(rows.tokens), LENGTH)
        assert (field[padding] == 0).all()


@given(st.lists(example, min_size=1, max_size=60))
def test_uses_few_rows(examples: list[Example]) -> None:
    """First-fit decreasing needs at most 11/9 of the best number of rows, and 6/9 (Dosa, 2007)."""
    total = sum(len(ids) for ids, _ in examples)
    long = sum(len(ids) > LENGTH // 2 for ids, _ in examples)
    lower_bound = max(-(-total // LENGTH), long)
    rows = pack(examples, LENGTH)
    occupied = (rows.segment_ids > 0).sum(axis=1)
    assert (occupied > 0).all()
    assert len(rows.tokens) >= lower_bound
    assert (occupied <= LENGTH // 2).sum() <= 1  # two half-empty rows would have been one


def test_first_fit_decreasing_by_hand() -> None:
    """Sizes 8, 7, 6, 5, 4 in rows of 10: 8 | 7 | 6 + 4 | 5."""
    examples = [([size] * size, [True] * size) for size in (4, 5, 6, 7, 8)]
    rows = pack(examples, 10, pad_id=0)
    expected = [[8] * 8 + [0] * 2, [7] * 7 + [0] * 3, [6] * 6 + [4] * 4, [5] * 5 + [0] * 5]
    np.testing.assert_array_equal(rows.tokens, expected)
    np.testing.assert_array_equal(rows.segment_ids[2], [1] * 6 + [2] * 4)
    np.testing.assert_array_equal(rows.positions[2], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    np.testing.assert_array_equal(rows.weights[2], [0, 1, 1, 1, 1, 1, 0, 1, 1, 1])


def test_padding_is_the_token_asked_for() -> None:
    rows = pack([([5], [True])], 3, pad_id=9)
    np.testing.assert_array_equal(rows.tokens, [[5, 9, 9]])
    assert rows.weights.sum() == 0


def test_nothing_to_pack() -> None:
    assert len(pack([], LENGTH).tokens) == 0
    assert pack([([], [])], LENGTH).tokens.shape == (0, LENGTH)


def test_an_example_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="17 tokens does not fit in rows of 16"):
        pack([([1] * 17, [True] * 17)], LENGTH)


@given(st.lists(tokens, max_size=100), st.integers(2, 20), st.booleans())
def test_chunks_lose_nothing(body: list[int], length: int, begun: bool) -> None:
    bos = 0
    pieces = chunk([bos, *body] if begun else body, bos, length)
    assert [token for ids, _ in pieces for token in ids[1:]] == body
    for ids, mask in pieces:
        assert ids[0] == bos
        assert len(ids) <= length
        assert mask == [False] + [True] * (len(ids) - 1)
    assert all(len(ids) == length for ids, _ in pieces[:-1])
