"""Paged attention against its definition, and the definition against dense attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import paged_attention as op
from tenfold.kernels.attention import AttentionSpec


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    """Causal attention of the last len(q) tokens of one sequence in float64, written from the formula."""
    n, H, K = q.shape
    group = H // k.shape[1]
    out = np.zeros(q.shape)
    for i in range(n):
        position = len(k) - n + i
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        for h in range(H):
            keys = k[first : position + 1, h // group].astype(np.float64)
            scores = keys @ q[i, h].astype(np.float64) * spec.scale
            if spec.softcap:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            weights = np.exp(scores - scores.max())
            out[i, h] = weights / weights.sum() @ v[first : position + 1, h // group].astype(np.float64)
    return out


class Case:
    """A random step: sequences with a past in scattered pages, and their new tokens packed together."""

    def __init__(self, seed: int, lengths: list[tuple[int, int]], B: int, J: int, G: int, K: int) -> None:
        rng = np.random.default_rng(seed)
        self.sequences = sorted(lengths, key=lambda length: length[1] > 1)
        S, H = len(self.sequences), J * G
        longest = max(total for total, _ in self.sequences)
        N = -(-longest // B) + 1
        pool = iter(rng.permutation(S * N) + 1)
        T = sum(new for _, new in self.sequences) + 3
        self.q = rng.standard_normal((T, H, K)).astype(np.float32)
        self.k = [rng.standard_normal((total, J, K)).astype(np.float32) for total, _ in self.sequences]
        self.v = [rng.standard_normal((total, J, K)).astype(np.float32) for total, _ in self.sequences]
        cache = op.make_cache(S * N + 1, B, J, K, jnp.float32)
        self.cache = jax.tree.map(lambda x: jnp.full_like(x, 1e4), cache)  # stale pages must not be seen
        tables = np.zeros((S, N), np.int32)
        for s, (total, _) in enumerate(self.sequences):
            for block in range(-(-total // B)):
                tables[s, block] = next(pool)
            at = np.arange(total)
            self.cache = op.write(
                self.cache, jnp.asarray(self.k[s]), jnp.asarray(self.v[s]), jnp.asarray(tables[s, at // B]), jnp.asarray(at % B)
            )
        starts = np.cumsum([0] + [new for _, new in self.sequences]).astype(np.int32)
        self.batch = op.RaggedBatch(
            block_tables=jnp.asarray(tables),
            kv_lens=jnp.asarray([total for total, _ in self.sequences], jnp.int32),
            query_starts=jnp.asarray(starts),
            num_decodes=jnp.asarray(sum(new == 1 for _, new in self.sequences), jnp.int32),
            num_seqs=jnp.asarray(S, jnp.int32),
        )
        self.starts = starts

    def expected(self, spec: AttentionSpec) -> np.ndarray:
        rows = [
            dense(self.q[self.starts[s] : self.starts[s + 1]], self.k[s], self.v[s], spec)
            for s in range(len(self.sequences))
        ]
        return np.concatenate(rows)


lengths = st.integers(1, 90).flatmap(lambda new: st.tuples(st.integers(new, new + 300), st.sampled_from([1, new])))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sequences=st.lists(lengths, min_size=1, max_size=11),
    page=st.sampled_from([4, 16, 32]),
    heads=st.sampled_from([(1, 1), (2, 2), (1, 3)]),
    window=st.sampled_from([None, 5, 40]),
    softcap=st.sampled_from([None, 3.0]),
)
def test_any_ragged_batch_equals_dense_attention(
    seed: int, sequences: list[tuple[int, int]], page: int, heads: tuple[int, int], window: int | None, softcap: float | None
) -> None:
    case = Case(seed, sequences, page, *heads, K=8)
    spec = AttentionSpec(scale=0.3, window=window, softcap=softcap)
    out = np.asarray(op.paged_attention(jnp.asarray(case.q), case.cache, case.batch, spec))
    expected = case.expected(spec)
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=2e-5, atol=2e-5)


def test_reference_equals_dense_attention() -> None:
    case = Case(0, [(70, 1), (9, 9), (40, 13)], 16, 2, 2, 8)
    spec = AttentionSpec(scale=0.3, window=20, softcap=5.0)
    positions = np.concatenate([np.arange(total - new, total) for total, new in case.sequences] + [np.zeros(3, int)])
    out = np.asarray(op.reference(jnp.asarray(case.q), case.cache, case.batch, jnp.asarray(positions), spec))
    expected = case.expected(spec)
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("window", [None, 33])
def test_a_row_does_not_depend_on_its_neighbours(window: int | None) -> None:
    spec = AttentionSpec(scale=0.3, window=window)
    together = Case(3, [(300, 1), (20, 1), (280, 70), (65, 65)], 16, 2, 2, 8)
    out = np.asarray(op.paged_attention(jnp.asarray(together.q), together.cache, together.batch, spec))
    start, end = together.starts[2], together.starts[3]
    alone = together.batch._replace(
        block_tables=together.batch.block_tables[2:3],
        kv_lens=together.batch.kv_lens[2:3],
        query_starts=jnp.asarray([0, end - start], jnp.int32),
        num_decodes=jnp.asarray(0, jnp.int32),
        num_seqs=jnp.asarray(1, jnp.int32),
    )
    single = np.asarray(op.paged_attention(jnp.asarray(together.q[start:end]), together.cache, alone, spec))
    np.testing.assert_array_equal(single, out[start:end])
