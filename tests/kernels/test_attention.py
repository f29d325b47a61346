"""Packed attention, whole and in blocks of queries, against dense attention of each segment in float64."""

from functools import partial

import jax
import numpy as np
import pytest

from tenfold.kernels import attention
from tenfold.kernels.attention import AttentionSpec
from tests.kernels.test_paged_attention import dense

LENGTHS = (5, 1, 23, 41)  # of the segments of a row


@pytest.mark.parametrize("block", [256, 16])
@pytest.mark.parametrize(
    "spec", [AttentionSpec(0.3), AttentionSpec(0.3, window=9, softcap=3.0), AttentionSpec(0.3, chunk=7)]
)
def test_equals_dense_attention_of_each_segment(
    spec: AttentionSpec, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    rng = np.random.default_rng(0)
    L, sinks = sum(LENGTHS), np.linspace(-1, 1, 4, dtype=np.float32)
    q, k, v = (rng.standard_normal((2, L, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    segments = np.broadcast_to(np.repeat(np.arange(4, dtype=np.int32), LENGTHS), (2, L))
    packed = jax.jit(partial(attention.packed_attention, spec=spec))
    found = np.asarray(packed(q, k, v, segments, sinks=sinks))
    ends = np.cumsum(LENGTHS)
    for row in range(2):
        for start, end in zip(ends - LENGTHS, ends, strict=True):
            wanted = dense(q[row, start:end], k[row, start:end], v[row, start:end], spec, sinks)
            np.testing.assert_allclose(found[row, start:end], wanted, rtol=2e-5, atol=2e-5)
