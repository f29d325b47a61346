"""Batches of packed rows out of documents: shuffled, encoded in threads, packed, mixed by weight, and resumable.

Grain reads and shuffles by number, so where an iterator stands is a few integers; packing happens in windows of rows,
and a restored iterator packs its window anew. Mixing is by rows, which are full, and so by tokens.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset

from tenfold.base.errors import ConfigError, DataError, TenfoldError
from tenfold.data.packing import Example, Rows, chunk, pack
from tenfold.data.records import Records
from tenfold.data.tokenizer import Tokenizer
from tenfold.parallel.layout import Layout

WINDOW = 256  # rows that are packed together: of documents of any lengths below a row's, 97 % is then tokens
PREFETCHED = 8  # batches that are ready before they are asked for

Encode = Callable[[Mapping[str, Any]], Sequence[Example]]
"""A row of data -> the examples that it becomes, none longer than a row of tokens."""


@runtime_checkable
class Batches(Protocol):
    """An endless iterator of batches that can say where it stands, and go back there."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]:
        """Where it stands, for JSON."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes where another one of the same data stood."""
        ...

    def close(self) -> None:
        """Ends its threads; it is not used any more."""
        ...


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows of data, what becomes of them, and their share of the tokens.

    Attributes:
        name: tells it from others, also in checkpoints.
        records: the rows.
        encode: what makes examples of a row.
        weight: its share, of the sum of all sources'.
    """

    name: str
    records: Records
    encode: Encode
    weight: float = 1.0


def encode_text(tokenizer: Tokenizer, length: int, column: str = "text") -> Encode:
    """Documents as tokens, cut where they are longer than a row; they begin and end as the tokenizer has it.

    Each piece of a long document starts with the token that begins a document, if there is one.
    """
    begin = tokenizer.bos_token_id if tokenizer.encode("")[:1] == [tokenizer.bos_token_id] else None
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(row: Mapping[str, Any]) -> Sequence[Example]:
        text = row[column]
        if not text.strip():
            return []
        ids = [*tokenizer.encode(text, add_special_tokens=False), *end]
        if begin is not None:
            return chunk(ids, begin, length)
        pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
        return [(piece, [True] * len(piece)) for piece in pieces if len(piece) > 1]

    return encode


def packed_batches(
    sources: Sequence[Source],
    *,
    rows: int,
    length: int,
    seed: int,
    pad_id: int = 0,
    share: tuple[int, int] = (0, 1),
    threads: int = 4,
) -> Batches:
    """Endless batches of `Rows` [rows, length]; the same arguments give the same ones.

    Each source is shuffled anew every time it is through. Shares are of different rows of data.

    Args:
        sources: with different names.
        rows: of this share in a batch.
        length: tokens of a row.
        seed: of the shuffles.
        pad_id: of what no document fills.
        share: which share of the rows is read here, and how many there are, as of `Layout.row_share`.
        threads: that read and encode each source.

    Raises:
        ConfigError: if a weight is not positive or names repeat.
        DataError: if a source has fewer rows than there are shares.
    """
    if not sources or any(source.weight <= 0 for source in sources):
        raise ConfigError("every source of data needs a weight above 0, and there must be one at least")
    if len({source.name for source in sources}) < len(sources):
        raise ConfigError(f"sources of data must have different names: {', '.join(s.name for s in sources)}")
    packed = {
        source.name: _PackedRows(_encoded(source, seed + i, share, threads), length, pad_id, seed + i)
        for i, source in enumerate(sources)
    }
    if len(packed) == 1:
        (mixed,) = packed.values()
    else:
        mixed = grain.IterDataset.mix(packed, {source.name: source.weight for source in sources})
    batched = mixed.batch(rows, batch_fn=stack_rows)
    return iter(ThreadPrefetchIterDataset(batched, prefetch_buffer_size=PREFETCHED))


def first_batches(
    source: Source, *, rows: int, length: int, count: int, pad_id: int = 0, share: tuple[int, int] = (0, 1)
) -> list[Rows]:
    """The first documents of a source, in their order, packed: what is held out, each document once.

    Args:
        source: whose weight does not count.
        rows, length, pad_id, share: as of `packed_batches`.
        count: batches at most; fewer if the documents do not fill them. Of several shares, all have as many.

    Raises:
        DataError: if there is nothing to measure on.
    """
    index, shares = share
    examples: list[Example] = []
    found, wanted = 0, count * rows * length
    for number in range(index, len(source.records), shares):
        new = source.encode(source.records[number])
        examples += new
        found += sum(len(ids) for ids, _ in new)
        if found >= wanted:
            break
    packed = pack(examples, length, pad_id)
    if not len(packed.tokens):
        raise DataError(f"{source.name} has no text to measure on")
    batches = count if shares > 1 else min(count, -(-len(packed.tokens) // rows))
    missing = max(0, batches * rows - len(packed.tokens))
    fills = Rows(pad_id, 0, 0, 0.0)
    whole = [
        np.pad(array[: batches * rows], ((0, missing), (0, 0)), constant_values=fill)
        for array, fill in zip(packed, fills, strict=True)
    ]
    return [Rows(*(array[at * rows : (at + 1) * rows] for array in whole)) for at in range(batches)]


def stack_rows(rows: Sequence[Rows]) -> Rows:
    """Rows [L] as one batch [N, L]."""
    return Rows(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


def _encoded(source: Source, seed: int, share: tuple[int, int], threads: int) -> grain.IterDataset:
    index, count = share
    if len(source.records) < count:
        raise DataError(f"{source.name} has {len(source.records)} rows, too few for {count} shares")

    def encode(number: int) -> Sequence[Example]:
        try:
            return source.encode(source.records[number])
        except TenfoldError as error:
            raise DataError(f"{source.records.where(number)}: {error}") from error

    numbers = grain.MapDataset.range(len(source.records)).shuffle(seed=seed % 2**32)
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=64 * max(threads, 1))
    return numbers[index::count].repeat().map(encode).to_iter_dataset(read)


class _PackedRows(grain.IterDataset):
    """Rows [L] out of lists of examples."""

    def __init__(self, parent: grain.IterDataset, length: int, pad_id: int, seed: int) -> None:
        super().__init__(parent)
        self._length, self._pad_id, self._seed = length, pad_id, seed

    def __iter__(self) -> "_PackedRowsIterator":
        return _PackedRowsIterator(iter(self._parent), self._length, self._pad_id, self._seed)


class _PackedRowsIterator(grain.DatasetIterator):
    """A window at a time: as many documents as fill it are packed, and the rows come in a random order."""

    def __init__(self, parent: grain.DatasetIterator, length: int, pad_id: int, seed: int) -> None:
        super().__init__(parent)
        self._length, self._pad_id, self._seed = length, pad_id, seed
        self._window, self._next = 0, 0
        self._rows: Rows | None = None
        self._window_state = self._parent.get_state()

    def __next__(self) -> Rows:
        if self._rows is not None and self._next == len(self._rows.tokens):
            self._window, self._next, self._rows = self._window + 1, 0, None
        if self._rows is None:
            self._window_state = self._parent.get_state()
            self._rows = self._pack_window()
        self._next += 1
        return Rows(*(array[self._next - 1] for array in self._rows))

    def _pack_window(self) -> Rows:
        examples: list[Example] = []
        wanted, found = WINDOW * self._length, 0
        empty = 0
        while found < wanted:
            new = next(self._parent)
            examples += new
            found += sum(len(ids) for ids, _ in new)
            empty = 0 if new else empty + 1
            if empty > _MOST_EMPTY:
                raise DataError(f"{empty} documents in a row have no text to train on; check the data and the column")
        rows = pack(examples, self._length, self._pad_id)
        order = np.random.default_rng([self._seed, self._window]).permutation(len(rows.tokens))
        return Rows(*(array[order] for array in rows))

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._window_state, "window": self._window, "next": self._next}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._window_state = state["parent"]
        self._window, self._next = state["window"], state["next"]
        self._rows = self._pack_window() if self._next else None


_MOST_EMPTY = 100_000


def place(batch: Any, layout: Layout) -> Any:
    """A batch of this process's share of rows as one of all rows on a mesh; as it is where there is none."""
    if layout.mesh is None:
        return batch
    _, shares = layout.row_share

    def whole(own: np.ndarray) -> jax.Array:
        shape = (len(own) * shares, *own.shape[1:])
        return jax.make_array_from_process_local_data(layout.rows, np.asarray(own), shape)

    return jax.tree.map(whole, batch)


def fill(batches: Iterator[Rows]) -> float:
    """The share of tokens that are no padding, of some batches."""
    real = total = 0
    for rows in batches:
        real += int((rows.segment_ids > 0).sum())
        total += rows.tokens.size
    return real / total
