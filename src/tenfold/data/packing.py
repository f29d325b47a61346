"""Pack many short examples into full training rows, so that a batch has no padding to speak of."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tenfold.base.errors import ConfigError

Example = tuple[Sequence[int], Sequence[bool]]
"""Token ids, and which of them the model has to predict from those before."""


class Rows(NamedTuple):
    """N training rows of L tokens. A token may attend to earlier tokens of its own segment only.

    Attributes:
        tokens: int32 [N, L] token ids; `pad_id` where `segment_ids` is 0.
        segment_ids: int32 [N, L]; 0 for padding; 1, 2, ... for the examples of a row, in their order.
        positions: int32 [N, L], the index of the token within its example; 0 for padding.
        weights: float32 [N, L], the weight of the loss on predicting this token from the one before it. The first
            token of a segment has none before it and always weighs 0: shift tokens and weights together.
    """

    tokens: Any
    segment_ids: Any
    positions: Any
    weights: Any


def chunk(ids: Sequence[int], bos_id: int, length: int) -> list[Example]:
    """Cut a long text into examples of at most `length` tokens, each starting with `bos_id`; all tokens are predicted.

    `ids` itself starts with `bos_id`, which the first example keeps and does not repeat.
    """
    body = list(ids[1:]) if ids and ids[0] == bos_id else list(ids)
    step = length - 1
    pieces = [body[start : start + step] for start in range(0, len(body), step)]
    return [([bos_id, *piece], [False, *([True] * len(piece))]) for piece in pieces]


def pack(examples: Iterable[Example], length: int = 256, pad_id: int = 0) -> Rows:
    """Place whole examples into rows of `length` tokens by first-fit decreasing (Johnson, 1973).

    An example is never split; rows come out in the order of packing (the fullest examples first), so shuffle them.

    Raises:
        ConfigError: an example is longer than a row.
    """
    pool = sorted(((list(ids), list(mask)) for ids, mask in examples if len(ids)), key=lambda example: -len(example[0]))
    if pool and len(pool[0][0]) > length:
        raise ConfigError(
            f"An example of {len(pool[0][0])} tokens does not fit in rows of {length}. Use longer rows or shorten it."
        )
    bins = _first_fit([len(ids) for ids, _ in pool], length)
    shape = (len(bins), length)
    rows = Rows(
        tokens=np.full(shape, pad_id, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
    )
    for row, members in enumerate(bins):
        start = 0
        for segment, member in enumerate(members, 1):
            ids, mask = pool[member]
            span = slice(start, start + len(ids))
            rows.tokens[row, span] = ids
            rows.segment_ids[row, span] = segment
            rows.positions[row, span] = np.arange(len(ids))
            rows.weights[row, span] = mask
            rows.weights[row, start] = 0.0
            start += len(ids)
    return rows


def _first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices of `sizes` (decreasing), each index in the first bin that has room.

    The leftmost bin with enough room is found in a tree of maxima, so that the whole takes O(n log n).
    """
    width = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * width)
    bins: list[list[int]] = []
    for index, size in enumerate(sizes):
        node = 1
        while node < width:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        if node - width == len(bins):
            bins.append([])
        bins[node - width].append(index)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
