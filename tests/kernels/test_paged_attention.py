"""Paged attention against its definition, and the definition against dense attention."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import paged_attention as op
from tenfold.kernels.attention import AttentionSpec

K = 16
LONGEST = 390
NEW = 90

paged_attention = jax.jit(op.paged_attention, static_argnums=3, static_argnames="decode_only")
write = jax.jit(op.write)


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec, sinks: np.ndarray | None) -> np.ndarray:
    """Causal attention of the last len(q) tokens of one sequence in float64, written from the formula."""
    n, H, _ = q.shape
    group = H // k.shape[1]
    positions, keys = np.arange(len(k) - n, len(k))[:, None], np.arange(len(k))[None]
    seen = (keys <= positions) & (keys > positions - (spec.window or len(k)))
    seen &= keys // (spec.chunk or len(k)) == positions // (spec.chunk or len(k))
    out = np.zeros(q.shape)
    for h in range(H):
        scores = q[:, h].astype(np.float64) @ k[:, h // group].astype(np.float64).T * spec.scale
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        weights = np.where(seen, np.exp(scores), 0)
        total = weights.sum(1, keepdims=True) + (0 if sinks is None else np.exp(np.float64(sinks[h])))
        out[:, h] = weights / total @ v[:, h // group].astype(np.float64)
    return out


def held(x: np.ndarray, cache: str) -> np.ndarray:
    """The numbers that a cache holds of keys or values, by its definition."""
    if cache == "float32":
        return x
    largest = np.float32({"int8": 127, "float8_e4m3fn": 448}[cache])
    peak = np.abs(x).max(-1, keepdims=True)
    codes = x * (largest / peak)
    codes = (np.rint(codes) if cache == "int8" else codes).astype(cache)
    return codes.astype(np.float64) * (peak / largest)


@dataclass(frozen=True)
class Sizes:
    """What a program is compiled for: packed tokens, rows, tokens of a page, key-value heads, queries per each, and
    what the cache is held in."""

    T: int
    S: int
    B: int
    J: int
    G: int
    cache: str = "float32"

    @property
    def N(self) -> int:
        return -(-LONGEST // self.B) + 1


class Case:
    """A random step: sequences with a past in scattered pages, and their new tokens packed together."""

    def __init__(self, seed: int, sizes: Sizes, lengths: list[tuple[int, int]]) -> None:
        """`lengths` are (tokens, new tokens) of each sequence; the new ones must fit into T, the sequences into S."""
        rng = np.random.default_rng(seed)
        self.sizes = sizes
        self.sequences = sorted(lengths, key=lambda length: length[1] > 1)
        T, S, B, J, G = sizes.T, sizes.S, sizes.B, sizes.J, sizes.G
        totals, new = [[length[i] for length in self.sequences] for i in (0, 1)]
        starts = np.cumsum([0, *new, *[0] * (S - len(new))]).astype(np.int32)
        self.starts = starts
        self.q = rng.standard_normal((T, J * G, K)).astype(np.float32)
        self.k = [rng.standard_normal((total, J, K)).astype(np.float32) for total in totals]
        self.v = [rng.standard_normal((total, J, K)).astype(np.float32) for total in totals]
        tables = np.zeros((S, sizes.N), np.int32)
        pages = rng.permutation(S * sizes.N) + 1
        for s, total in enumerate(totals):
            blocks = -(-total // B)
            tables[s, :blocks], pages = pages[:blocks], pages[blocks:]
        empty = op.make_cache(S * sizes.N + 1, B, J, K, sizes.cache)
        stale = jax.tree.map(lambda x: np.full(x.shape, 100 if x.dtype.itemsize == 1 else 1e4, x.dtype), empty)
        self.cache = self.fill(stale, sizes, tables)
        self.batch = op.RaggedBatch(
            block_tables=tables,
            kv_lens=np.asarray(totals + [0] * (S - len(totals)), np.int32),
            query_starts=starts,
            num_decodes=np.int32(sum(n == 1 for n in new)),
            num_seqs=np.int32(len(new)),
        )

    def fill(self, cache: op.PagedCache, sizes: Sizes, tables: np.ndarray) -> op.PagedCache:
        """The cache with every sequence in its pages; always the same shapes."""
        B, room = sizes.B, sizes.S * LONGEST
        at = [np.arange(len(k)) for k in self.k]
        pages = np.concatenate([tables[s, a // B] for s, a in enumerate(at)])
        pages = np.pad(pages, (0, room - len(pages))).astype(np.int32)  # the rest goes to the null page
        offsets = np.concatenate(at) % B
        offsets = np.pad(offsets, (0, room - len(offsets))).astype(np.int32)
        k, v = (
            np.pad(np.concatenate(x), ((0, room - sum(map(len, at))), (0, 0), (0, 0)), constant_values=1e4)
            for x in (self.k, self.v)
        )
        return write(cache, k, v, pages, offsets)

    def expected(self, spec: AttentionSpec, sinks: np.ndarray | None) -> np.ndarray:
        k, v = ([held(x, self.sizes.cache) for x in xs] for xs in (self.k, self.v))
        rows = zip(self.starts, self.starts[1:], k, v, strict=False)
        return np.concatenate([dense(self.q[start:end], k, v, spec, sinks) for start, end, k, v in rows])


def check(case: Case, spec: AttentionSpec, sinks: np.ndarray | None = None, *, decode_only: bool = False) -> None:
    out = np.asarray(paged_attention(case.q, case.cache, case.batch, spec, sinks, decode_only=decode_only))
    expected = case.expected(spec, sinks)
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=2e-5, atol=2e-5)
    assert np.isfinite(out).all()  # padding goes through the layers that follow


def packed(lengths: list[tuple[int, int]], sizes: Sizes) -> list[tuple[int, int]]:
    """As many of the first as fit."""
    ends = np.cumsum([new for _, new in lengths])
    return [length for length, end in zip(lengths, ends, strict=True) if end <= sizes.T][: sizes.S]


length = st.integers(1, NEW).flatmap(lambda new: st.tuples(st.integers(new, LONGEST), st.sampled_from([1, new])))

# A page of 48 does not divide the chunk of keys, one of 4 is smaller than the queries that share a product.
CASES = [
    (Sizes(160, 11, 4, 2, 2), AttentionSpec(0.3, window=None, softcap=3.0)),
    (Sizes(160, 11, 16, 1, 3), AttentionSpec(0.3, window=None)),
    (Sizes(160, 11, 16, 2, 2), AttentionSpec(0.3, window=40, softcap=3.0)),
    (Sizes(160, 11, 48, 1, 1), AttentionSpec(0.3, window=9, chunk=37)),
    (Sizes(160, 11, 16, 2, 2, "int8"), AttentionSpec(0.3, window=None)),
    (Sizes(160, 11, 4, 1, 3, "float8_e4m3fn"), AttentionSpec(0.3, window=40, softcap=3.0)),
]


def sinks_of(sizes: Sizes) -> np.ndarray | None:
    """Some in half of the cases."""
    return np.linspace(-3, 3, sizes.G, dtype=np.float32) if sizes.J == 1 else None


@pytest.mark.parametrize(("sizes", "spec"), CASES)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**16), lengths=st.lists(length, min_size=1, max_size=11))
def test_any_ragged_batch_equals_dense_attention(
    sizes: Sizes, spec: AttentionSpec, seed: int, lengths: list[tuple[int, int]]
) -> None:
    check(Case(seed, sizes, packed(lengths, sizes)), spec, sinks_of(sizes))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "spec"), CASES)
@settings(max_examples=300)
@given(seed=st.integers(0, 2**16), lengths=st.lists(length, min_size=1, max_size=11))
def test_any_ragged_batch_equals_dense_attention_at_depth(
    sizes: Sizes, spec: AttentionSpec, seed: int, lengths: list[tuple[int, int]]
) -> None:
    check(Case(seed, sizes, packed(lengths, sizes)), spec, sinks_of(sizes))


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        (Sizes(11, 11, 16, 2, 2), AttentionSpec(0.3, window=None, softcap=3.0)),
        (Sizes(2, 4, 16, 1, 3), AttentionSpec(0.3, window=40)),  # rows are rounded up further than tokens
        (Sizes(11, 11, 16, 2, 2, "float8_e4m3fn"), AttentionSpec(0.3, window=None)),
    ],
)
@settings(max_examples=12)
@given(seed=st.integers(0, 2**16), totals=st.lists(st.integers(1, LONGEST), min_size=1, max_size=11))
def test_any_decoding_batch_equals_dense_attention(
    sizes: Sizes, spec: AttentionSpec, seed: int, totals: list[int]
) -> None:
    check(Case(seed, sizes, [(total, 1) for total in totals][: sizes.T]), spec, sinks_of(sizes), decode_only=True)


@pytest.mark.parametrize("lengths", [[(256, 64)], [(257, 65)], [(1, 1)], [(90, 90), (90, 2), (64, 64)], [(LONGEST, 1)]])
def test_edges_of_blocks_and_chunks(lengths: list[tuple[int, int]]) -> None:
    check(Case(0, CASES[2][0], lengths), CASES[2][1])


@pytest.mark.parametrize("cache", ["float32", "int8", "float8_e4m3fn"])
def test_reference_equals_dense_attention(cache: str) -> None:
    case = Case(0, Sizes(26, 3, 16, 2, 2, cache), [(70, 1), (9, 9), (40, 13)])
    spec, sinks = AttentionSpec(scale=0.3, window=20, softcap=5.0, chunk=32), np.array([-1, 0, 1, 2], np.float32)
    positions = np.concatenate([np.arange(total - new, total) for total, new in case.sequences] + [np.zeros(3, int)])
    reference = jax.jit(partial(op.reference, spec=spec))
    out = np.asarray(reference(case.q, case.cache, case.batch, positions.astype(np.int32), sinks=sinks))
    expected = case.expected(spec, sinks)
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 33])
def test_a_row_does_not_depend_on_its_neighbours(window: int | None) -> None:
    spec = AttentionSpec(scale=0.3, window=window)
    together = Case(3, Sizes(140, 4, 16, 2, 2), [(300, 1), (20, 1), (280, 70), (65, 65)])
    out = np.asarray(paged_attention(together.q, together.cache, together.batch, spec))
    start, end = together.starts[2], together.starts[3]
    alone = together.batch._replace(
        block_tables=together.batch.block_tables[2:3],
        kv_lens=together.batch.kv_lens[2:3],
        query_starts=np.asarray([0, end - start], np.int32),
        num_decodes=np.int32(0),
        num_seqs=np.int32(1),
    )
    single = np.asarray(paged_attention(together.q[start:end], together.cache, alone, spec))
    np.testing.assert_array_equal(single, out[start:end])


@pytest.mark.parametrize("cache", ["float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_overflow_stays_in_its_own_sequence(value: float, cache: str) -> None:
    """Pages of a sequence whose activations overflowed go to another one, which reads them before they are full."""
    sizes, spec = replace(CASES[2][0], cache=cache), CASES[2][1]
    case = Case(5, sizes, [(100, 1), (70, 20)])
    expected = np.asarray(paged_attention(case.q, case.cache, case.batch, spec))
    pages, offsets = np.divmod(np.arange(case.cache.k.shape[0] * sizes.B, dtype=np.int32), sizes.B)
    broken = np.full((len(pages), sizes.J, K), value, np.float32)
    cache = write(case.cache, broken, broken, pages, offsets)
    cache = case.fill(cache, sizes, case.batch.block_tables)
    out = np.asarray(paged_attention(case.q, cache, case.batch, spec))
    np.testing.assert_array_equal(out[:21], expected[:21])
