"""The native paged attention against attention computed in float64, and its bits against themselves."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import native
from tenfold.kernels.attention import AttentionSpec
from tenfold.kernels.paged_attention import NativeCache, RaggedBatch, read, update

pytestmark = [
    pytest.mark.usefixtures("optimised"),
    pytest.mark.skipif(native.library() is None, reason="the native kernels are not built"),
]

PAIRS = [  # of queries, and of the cache
    ("float32", "float32"),
    ("bfloat16", "bfloat16"),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("float32", "int8"),
    ("bfloat16", "int8"),
    ("float32", "float8_e4m3fn"),
    ("bfloat16", "float8_e4m3fn"),
]
REFUSED = (jax.errors.JaxRuntimeError, ValueError)  # by when XLA runs the call
SPLIT = 4096  # keys after which another partial softmax begins; kSplit of src/native/attention.h


# --- the operations --------------------------------------------------------------------------------------------------


def attend(
    q: jax.Array, cache: NativeCache, batch: RaggedBatch, sinks: jax.Array | None, spec: AttentionSpec
) -> jax.Array:
    """What `update` does without storing anything; with a logit per head that only adds to the softmax's total."""
    buffers = [x for x in (*cache, sinks) if x is not None]
    rows = batch.block_tables, batch.kv_lens, batch.query_starts, batch.num_seqs
    return jax.ffi.ffi_call("tenfold_paged_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))(
        q,
        *rows,
        *buffers,
        scale=np.float32(spec.scale),
        window=np.int64(spec.window or 0),
        chunk=np.int64(spec.chunk or 0),
        softcap=np.float32(spec.softcap or 0),
    )


run_attend = jax.jit(attend, static_argnames="spec")
run_update = jax.jit(update, static_argnames="spec", donate_argnames="cache")


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Key-value heads, queries per each, head dim, tokens of a page, and the dtypes of queries and cache."""

    J: int = 2
    G: int = 2
    K: int = 32
    B: int = 16
    queries: str = "float32"
    cache: str = "float32"

    @property
    def u(self) -> int:
        return 4 // jnp.dtype(self.cache).itemsize

    @property
    def scaled(self) -> bool:
        return self.u == 4


class Sequence(NamedTuple):
    """Queries [n, H, K] of all its tokens, keys and values [n, J, K] as the cache holds them, without their scales."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    k_scales: np.ndarray | None
    v_scales: np.ndarray | None

    def numbers(self, end: int) -> tuple[np.ndarray, np.ndarray]:
        k, v = self.k[:end].astype(np.float64), self.v[:end].astype(np.float64)
        if self.k_scales is None or self.v_scales is None:
            return k, v
        return k * self.k_scales[:end, :, None], v * self.v_scales[:end, :, None]


def draw_sequence(rng: np.random.Generator, heads: Heads, length: int) -> Sequence:
    q = rng.standard_normal((length, heads.J * heads.G, heads.K)).astype(heads.queries)
    shape = (length, heads.J, heads.K)
    if heads.scaled:
        codes = [draw_codes(rng, shape, heads.cache) for _ in "kv"]
        largest = 127 if heads.cache == "int8" else 448
        scales = [rng.uniform(0.4, 4, shape[:2]).astype(np.float32) / np.float32(largest) for _ in "kv"]
        return Sequence(q, *codes, *scales)
    return Sequence(q, *(rng.standard_normal(shape).astype(heads.cache) for _ in "kv"), None, None)


def draw_codes(rng: np.random.Generator, shape: tuple[int, ...], cache: str) -> np.ndarray:
    """Any of 8 bits that are written: not -128, and of floats not NaN."""
    if cache == "int8":
        return rng.integers(-127, 128, shape).astype(np.int8)
    return (rng.integers(0, 127, shape) + 128 * rng.integers(0, 2, shape)).astype(np.uint8).view(cache)


def first(s: Sequence, end: int) -> Sequence:
    return Sequence(*(None if x is None else x[:end] for x in s))


def lay_out(heads: Heads, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [P, B, J, K] as the pages of a cache."""
    P, B, J, K = k.shape
    u = heads.u
    keys = k.transpose(0, 2, 3, 1).reshape(P, J, K // u, u, B).swapaxes(3, 4)
    values = v.transpose(0, 2, 1, 3).reshape(P, J, B // u, u, K).swapaxes(3, 4)
    return np.ascontiguousarray(keys), np.ascontiguousarray(values)


class Case:
    """Sequences in scattered pages; every slot that is not theirs holds NaN, or codes with a scale of NaN."""

    def __init__(self, heads: Heads, sequences: list[Sequence], seed: int = 0, spare: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.heads, self.sequences = heads, sequences
        B, J, K = heads.B, heads.J, heads.K
        blocks = [-(-len(s.k) // B) for s in sequences]
        self.P = P = 2 + sum(blocks) + spare
        self.tables = np.zeros((len(sequences) + 1, max(blocks) + 1), np.int32)
        pages = rng.permutation(P - 1) + 1
        wild = (
            np.full((P, B, J, K), np.nan, heads.cache)
            if not heads.scaled
            else (rng.integers(0, 256, (P, B, J, K)).astype(np.uint8).view(heads.cache))
        )
        self.k, self.v = wild.copy(), wild.copy()
        self.k_scales, self.v_scales = (np.full((P, B, J), np.nan, np.float32) for _ in "kv")
        for row, (s, n) in enumerate(zip(sequences, blocks, strict=True)):
            self.tables[row, :n], pages = pages[:n], pages[n:]
            self.store(row, s, 0, len(s.k))

    def slots(self, row: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.arange(start, end)
        return self.tables[row, at // self.heads.B], at % self.heads.B

    def store(self, row: int, s: Sequence, start: int, end: int) -> None:
        at = self.slots(row, start, end)
        self.k[at], self.v[at] = s.k[start:end], s.v[start:end]
        if s.k_scales is not None and s.v_scales is not None:
            self.k_scales[at], self.v_scales[at] = s.k_scales[start:end], s.v_scales[start:end]

    def forget(self, row: int, start: int, end: int) -> None:
        """Makes slots hold nothing."""
        at = self.slots(row, start, end)
        self.k_scales[at] = self.v_scales[at] = np.nan
        self.k[at] = self.v[at] = 77 if self.heads.scaled else np.nan

    def cache(self) -> NativeCache:
        keys, values = lay_out(self.heads, self.k, self.v)
        if not self.heads.scaled:
            return NativeCache(jnp.asarray(keys), jnp.asarray(values))
        scales = (jnp.asarray(np.ascontiguousarray(x.swapaxes(1, 2))) for x in (self.k_scales, self.v_scales))
        return NativeCache(jnp.asarray(keys), jnp.asarray(values), *scales)

    def batch(self, parts: list[tuple[int, int, int]]) -> RaggedBatch:
        """Rows of (sequence, start, end): its tokens of this step."""
        S = len(parts) + 1
        tables = np.zeros((S, self.tables.shape[1]), np.int32)
        tables[:-1] = self.tables[[row for row, _, _ in parts]]
        news = [end - start for _, start, end in parts]
        return RaggedBatch(
            block_tables=tables,
            kv_lens=np.asarray([end for _, _, end in parts] + [0], np.int32),
            query_starts=np.cumsum([0, *news, 0]).astype(np.int32),
            num_decodes=np.int32(sum(n == 1 for n in news)),
            num_seqs=np.int32(S - 1),
        )

    def queries(self, parts: list[tuple[int, int, int]], padding: int = 0) -> np.ndarray:
        q = np.concatenate([self.sequences[row].q[start:end] for row, start, end in parts])
        return np.pad(q, ((0, padding), (0, 0), (0, 0)), constant_values=np.nan)

    def run(
        self, parts: list[tuple[int, int, int]], spec: AttentionSpec, sinks: np.ndarray | None = None, padding: int = 0
    ) -> np.ndarray:
        return np.asarray(run_attend(self.queries(parts, padding), self.cache(), self.batch(parts), sinks, spec=spec))


def dense(s: Sequence, start: int, end: int, spec: AttentionSpec, sinks: np.ndarray | None) -> np.ndarray:
    """Causal attention of the tokens [start, end) of one sequence in float64, written from the formula."""
    q = s.q[start:end].astype(np.float64)
    k, v = s.numbers(end)
    group = q.shape[1] // k.shape[1]
    positions, keys = np.arange(start, end)[:, None], np.arange(end)[None]
    seen = (keys <= positions) & (keys > positions - (spec.window or end))
    seen &= keys // (spec.chunk or end) == positions // (spec.chunk or end)
    out = np.zeros(q.shape)
    for h in range(q.shape[1]):
        scores = q[:, h] @ k[:, h // group].T * spec.scale
        if spec.softcap:
            scores = spec.softcap * np.tanh(scores / spec.softcap)
        peak = np.where(seen, scores, -np.inf).max(1, keepdims=True)
        weights = np.where(seen, np.exp(np.minimum(scores - peak, 0)), 0)
        total = weights.sum(1, keepdims=True) + (0 if sinks is None else np.exp(np.float64(sinks[h]) - peak))
        out[:, h] = weights / total @ v[:, h // group]
    return out


def check(case: Case, parts: list[tuple[int, int, int]], spec: AttentionSpec, sinks: np.ndarray | None) -> None:
    out = case.run(parts, spec, sinks, padding=3).astype(np.float64)
    expected = np.concatenate([dense(case.sequences[row], start, end, spec, sinks) for row, start, end in parts])
    # Weights and outputs are rounded to bfloat16 if queries are; scores, of up to about 30, are off by some 2^-24 each.
    largest = max(np.abs(case.sequences[row].numbers(end)[1]).max() for row, _, end in parts)
    bound = 2.0**-7 if case.heads.queries == "bfloat16" else 2e-5
    np.testing.assert_allclose(out[:-3], expected, rtol=0, atol=bound * largest)
    assert (out[-3:] == 0).all()


# --- right -----------------------------------------------------------------------------------------------------------


@st.composite
def heads_of(draw: st.DrawFn) -> Heads:
    queries, cache = draw(st.sampled_from(PAIRS))
    return Heads(
        J=draw(st.integers(1, 3)),
        G=draw(st.sampled_from([1, 2, 3, 4, 5, 8, 13])),
        K=draw(st.sampled_from([4, 8, 16, 20, 40, 64, 80, 96, 128])),
        B=draw(st.sampled_from([4, 8, 16, 20, 32, 48, 128])),
        queries=queries,
        cache=cache,
    )


length = st.integers(1, 60).flatmap(lambda new: st.tuples(st.integers(0, 330), st.sampled_from([1, new])))
specs = st.builds(
    AttentionSpec,
    scale=st.sampled_from([0.1, 0.3]),
    window=st.sampled_from([None, 1, 5, 40, 300]),
    chunk=st.sampled_from([None, None, 1, 7, 64, 250]),
    softcap=st.sampled_from([None, 3.0, 30.0]),
)


@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=15)
@given(heads_of(), st.lists(length, min_size=1, max_size=6), specs, st.booleans(), st.integers(0, 99))
def test_any_ragged_batch_equals_attention_in_float64(
    heads: Heads, lengths: list[tuple[int, int]], spec: AttentionSpec, with_sinks: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    case = Case(heads, [draw_sequence(rng, heads, past + new) for past, new in lengths], seed)
    sinks = rng.standard_normal(heads.J * heads.G).astype(np.float32) * 2 if with_sinks else None
    check(case, [(row, past, past + new) for row, (past, new) in enumerate(lengths)], spec, sinks)


@pytest.mark.parametrize(("queries", "cache"), PAIRS)
@pytest.mark.parametrize(("window", "chunk"), [(None, None), (3000, None), (None, 4300)])
def test_long_sequences_equal_attention_in_float64(
    queries: str, cache: str, window: int | None, chunk: int | None
) -> None:
    """One sequence, whose splits are tasks of their own; and several, whose splits are not."""
    heads, spec = Heads(J=1, K=16, queries=queries, cache=cache), AttentionSpec(0.3, window, chunk=chunk)
    rng = np.random.default_rng(1)
    case = Case(heads, [draw_sequence(rng, heads, n) for n in (3 * SPLIT + 33, SPLIT + 1, SPLIT, 20)])
    ends = [len(s.k) for s in case.sequences]
    check(case, [(0, ends[0] - 1, ends[0])], spec, np.ones(2, np.float32))
    check(case, [(0, ends[0] - 70, ends[0])], spec, None)
    check(case, [(row, end - 1 - row, end) for row, end in enumerate(ends)], spec, None)


def test_large_scores_and_far_apart_ones_do_not_overflow() -> None:
    heads = Heads()
    s = draw_sequence(np.random.default_rng(0), heads, 600)
    for factor in (60, 1e-3):
        case = Case(heads, [s._replace(k=s.k * np.float32(factor))])
        out = case.run([(0, 590, 600)], AttentionSpec(1.0))
        expected = dense(case.sequences[0], 590, 600, AttentionSpec(1.0), None)
        # A score of 1,000 is off by 1e-4 or so.
        np.testing.assert_allclose(out, expected, rtol=0, atol=5e-3 if factor == 60 else 1e-5)


@pytest.mark.parametrize(("queries", "cache"), PAIRS)
def test_sinks_of_minus_infinity_are_none(queries: str, cache: str) -> None:
    heads = Heads(queries=queries, cache=cache)
    case = Case(heads, [draw_sequence(np.random.default_rng(0), heads, 300)])
    without, with_them = (case.run([(0, 200, 300)], AttentionSpec(0.3), s) for s in (None, np.full(4, -np.inf, "f4")))
    np.testing.assert_array_equal(without, with_them)


@pytest.mark.parametrize(("queries", "cache"), PAIRS)
def test_reading_a_cache_attends_to_what_is_in_it(queries: str, cache: str) -> None:
    heads, spec = Heads(queries=queries, cache=cache), AttentionSpec(0.3, window=50, softcap=5.0)
    case = Case(heads, [draw_sequence(np.random.default_rng(0), heads, n) for n in (300, 20)])
    parts = [(1, 19, 20), (0, 200, 300)]
    out = jax.jit(read, static_argnames="spec")(case.queries(parts), case.cache(), case.batch(parts), spec=spec)
    np.testing.assert_array_equal(out, case.run(parts, spec))


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("queries", "cache"), PAIRS)
def test_a_token_has_the_same_bits_however_it_is_computed(queries: str, cache: str) -> None:
    heads = Heads(J=1, G=3, K=24, queries=queries, cache=cache)
    spec = AttentionSpec(0.3, window=700 if queries == cache else None, softcap=20.0)
    rng = np.random.default_rng(2)
    n = SPLIT + 300
    sequences = [draw_sequence(rng, heads, length) for length in (n, 500, 40)]
    whole = Case(heads, sequences[:1]).run([(0, 0, n)], spec)

    case = Case(heads, sequences, seed=1)  # in other pages
    cuts = sorted({0, n, *rng.integers(1, n, 3).tolist()})
    for start, end in pairwise(cuts):  # in chunks, which hold no later keys; beside other rows
        parts = [(0, start, end), (1, 499, 500), (2, 10, 40)]
        part = Case(heads, [first(sequences[0], end), *sequences[1:]], seed=end).run(parts, spec)
        np.testing.assert_array_equal(part[: end - start], whole[start:end])
    for position in [0, 1, 15, 16, 255, 256, SPLIT - 1, SPLIT, n - 1, *rng.integers(0, n, 4).tolist()]:
        (alone,) = case.run([(0, position, position + 1)], spec)
        np.testing.assert_array_equal(alone, whole[position])


# --- what must not be seen -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("queries", "cache"), PAIRS)
@pytest.mark.parametrize("B", [16, 20])
@pytest.mark.parametrize(
    "spec", [AttentionSpec(0.3, window=50), AttentionSpec(0.3, chunk=791)], ids=["window", "chunk"]
)
def test_pages_out_of_reach_are_not_read(queries: str, cache: str, B: int, spec: AttentionSpec) -> None:
    heads = Heads(B=B, queries=queries, cache=cache)
    case = Case(heads, [draw_sequence(np.random.default_rng(0), heads, 900)])
    parts = [(0, 840, 900)]
    expected = case.run(parts, spec)
    case.forget(0, 0, (840 - 50 + 1) // B * B)
    np.testing.assert_array_equal(case.run(parts, spec), expected)
    case.tables[0, : (840 - 50 + 1) // B] = 0  # the null page, which holds NaN
    np.testing.assert_array_equal(case.run(parts, spec), expected)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("queries", "cache"), PAIRS)
def test_an_overflow_is_seen_by_its_own_sequence_after_it_and_by_nothing_else(queries: str, cache: str) -> None:
    heads, spec = Heads(queries=queries, cache=cache), AttentionSpec(0.3)
    rng = np.random.default_rng(0)
    parts = [(0, 0, 60), (1, 50, 60)]
    case = Case(heads, [draw_sequence(rng, heads, 60) for _ in "01"])
    q, k, v = (jnp.asarray(rng.standard_normal((70, n, heads.K)), queries) for n in (4, 2, 2))
    expected, _ = run_update(q, k, v, case.cache(), case.batch(parts), spec=spec)
    k, v = k.at[33, 1, 5].set(jnp.nan), v.at[20, 0, 5].set(-jnp.inf)
    out, after = run_update(q, k, v, case.cache(), case.batch(parts), spec=spec)
    assert np.isnan(np.asarray(out)[33:60, 2:]).all()
    same = np.ones((70, 4), bool)
    same[33:60, 2:] = same[20:60, :2] = False
    np.testing.assert_array_equal(np.asarray(out)[same], np.asarray(expected)[same])
    assert np.isfinite(np.asarray(after.v, np.float32)[case.tables[0, :3]]).all()


@pytest.mark.parametrize("page", [-1, 2**31 - 1])
@pytest.mark.parametrize("B", [16, 20])
def test_a_page_that_does_not_exist_is_not_touched(page: int, B: int) -> None:
    heads, spec = Heads(B=B), AttentionSpec(0.3)
    case = Case(heads, [draw_sequence(np.random.default_rng(0), heads, 100)])
    case.tables[0, 1:] = page
    q = jnp.asarray(case.queries([(0, 0, 100)]))
    before = np.asarray(case.cache().k)
    _, after = run_update(q, q[:, :2], q[:, :2], case.cache(), case.batch([(0, 0, 100)]), spec=spec)
    first = case.tables[0, 0]
    np.testing.assert_array_equal(np.delete(after.k, first, axis=0), np.delete(before, first, axis=0))


# --- writing ---------------------------------------------------------------------------------------------------------


def stored(x: np.ndarray, heads: Heads) -> tuple[np.ndarray, np.ndarray | None]:
    """What the cache holds of new keys or values [n, J, K], by its definition."""
    if not heads.scaled:
        return x.astype(heads.cache), None
    largest = np.float32(127 if heads.cache == "int8" else 448)
    wide = x.astype(np.float32)
    peak = np.abs(wide).max(-1)
    inverse = np.divide(largest, peak, out=np.zeros_like(peak), where=peak > 0)
    codes = wide * inverse[..., None]
    return (np.rint(codes) if heads.cache == "int8" else codes).astype(heads.cache), peak / largest


@pytest.mark.usefixtures("instruction_set")
@settings(max_examples=10)
@given(heads_of(), st.lists(length, min_size=1, max_size=4), st.integers(0, 99))
def test_an_update_stores_what_it_is_given_and_attends_to_it(
    heads: Heads, lengths: list[tuple[int, int]], seed: int
) -> None:
    rng, spec = np.random.default_rng(seed), AttentionSpec(0.3)
    case = Case(heads, [draw_sequence(rng, heads, past + new) for past, new in lengths], seed)
    parts = [(row, past, past + new) for row, (past, new) in enumerate(lengths)]
    q = case.queries(parts)
    k, v = (rng.standard_normal((len(q), heads.J, heads.K)).astype(heads.queries) for _ in "kv")
    for row, start, end in parts:
        case.forget(row, start, end)
    out, after = run_update(q, k, v, case.cache(), case.batch(parts), spec=spec)
    at = 0
    for row, start, end in parts:
        (new_k, k_scales), (new_v, v_scales) = (stored(x[at : at + end - start], heads) for x in (k, v))
        slots = case.slots(row, start, end)
        case.k[slots], case.v[slots] = new_k, new_v
        if k_scales is not None and v_scales is not None:
            case.k_scales[slots], case.v_scales[slots] = k_scales, v_scales
        at += end - start
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(case.cache()), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()  # NaN and all
    np.testing.assert_array_equal(out, run_attend(q, case.cache(), case.batch(parts), None, spec=spec))


@pytest.mark.parametrize("cache", ["float32", "bfloat16", "int8", "float8_e4m3fn"])
def test_the_cache_is_never_copied(cache: str) -> None:
    heads, spec = Heads(K=64, queries="float32", cache=cache), AttentionSpec(0.3)
    case = Case(heads, [draw_sequence(np.random.default_rng(0), heads, 40)], spare=500)
    parts = [(0, 0, 40)]
    q = jnp.asarray(case.queries(parts))

    def layers(q: jax.Array, caches: list[NativeCache], batch: RaggedBatch) -> tuple[jax.Array, list[NativeCache]]:
        updated = []
        for cache in caches:
            q, cache = update(q, q[:, :2], q[:, 2:], cache, batch, spec)
            updated.append(cache)
        return q, updated

    caches = [case.cache(), case.cache()]
    compiled = jax.jit(layers, donate_argnums=1).lower(q, caches, case.batch(parts)).compile()
    analysis = compiled.memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves(caches))
    assert analysis is not None and analysis.temp_size_in_bytes < 10 * q.nbytes < held
    before = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(caches)]
    _, caches = compiled(q, caches, case.batch(parts))
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(caches)] == before


# --- arguments -------------------------------------------------------------------------------------------------------


def test_a_step_without_rows_gives_zeros() -> None:
    heads = Heads()
    case = Case(heads, [draw_sequence(np.random.default_rng(0), heads, 20)])
    batch = case.batch([(0, 0, 20)])._replace(num_seqs=np.int32(0))
    out = run_attend(case.queries([(0, 0, 20)]), case.cache(), batch, None, spec=AttentionSpec(0.3))
    assert (np.asarray(out) == 0).all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("kv_lens", np.asarray([19, 0], np.int32), "kv_lens"),
        ("kv_lens", np.asarray([1000, 0], np.int32), "kv_lens"),
        ("kv_lens", np.asarray([20, 0, 0], np.int32), "kv_lens"),
        ("query_starts", np.asarray([1, 20, 20], np.int32), "query_starts"),
        ("query_starts", np.asarray([0, 21, 21], np.int32), "query_starts"),
        ("query_starts", np.asarray([0, -1, 20], np.int32), "query_starts"),
        ("num_seqs", np.int32(3), "num_seqs"),
        ("num_seqs", np.int32(-1), "num_seqs"),
        ("block_tables", np.zeros((2, 3), np.float32), "block tables"),
    ],
)
def test_rows_that_cannot_be_are_refused(field: str, value: np.ndarray, message: str) -> None:
    heads = Heads()
    case = Case(heads, [draw_sequence(np.random.default_rng(0), heads, 20)])
    batch = case.batch([(0, 0, 20)])._replace(**{field: value})
    with pytest.raises(REFUSED, match=message):
        run_attend(case.queries([(0, 0, 20)]), case.cache(), batch, None, spec=AttentionSpec(0.3)).block_until_ready()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, cache: (q.astype(jnp.float16), cache), "q must be"),
        (lambda q, cache: (q[0], cache), "q must be"),
        (lambda q, cache: (q[:, :3], cache), "H one of J"),
        (lambda q, cache: (q[:, :, :16], cache), "pages must be"),
        (lambda q, cache: (q, cache._replace(k=cache.k[0])), "pages must be"),
        (lambda q, cache: (q, cache._replace(v=cache.v[1:])), "pages must be"),
        (lambda q, cache: (q, cache._replace(v=cache.v.astype(jnp.bfloat16))), "pages must be"),
        (lambda q, cache: (q, NativeCache(cache.k.astype(jnp.int8), cache.v.astype(jnp.int8))), "multiples of u"),
        (lambda q, cache: (q, cache._replace(k_scales=jnp.zeros(5))), "sinks"),
    ],
)
def test_buffers_that_do_not_fit_are_refused(change, message: str) -> None:
    heads = Heads()
    case = Case(heads, [draw_sequence(np.random.default_rng(0), heads, 20)])
    q, cache = change(jnp.asarray(case.queries([(0, 0, 20)])), case.cache())
    if message == "multiples of u":
        cache = NativeCache(cache.k[:, :, :, :15], cache.v[:, :, :15])
    with pytest.raises(REFUSED, match=message):
        jax.jit(partial(attend, spec=AttentionSpec(0.3)))(q, cache, case.batch([(0, 0, 20)]), None).block_until_ready()


@pytest.mark.parametrize("cache", ["int8", "float8_e4m3fn"])
def test_scales_of_pages_must_be_theirs(cache: str) -> None:
    heads = Heads(cache=cache)
    case = Case(heads, [draw_sequence(np.random.default_rng(0), heads, 20)])
    q, cache = case.queries([(0, 0, 20)]), case.cache()
    for wrong in (cache._replace(v_scales=None), cache._replace(v_scales=cache.v_scales[1:])):
        with pytest.raises(REFUSED, match="scales"):
            run_attend(q, wrong, case.batch([(0, 0, 20)]), None, spec=AttentionSpec(0.3)).block_until_ready()
