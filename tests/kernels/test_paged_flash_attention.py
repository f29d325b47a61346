"""The kernel that reads pages on a GPU, interpreted where there is none, against dense attention in float64."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import paged_attention as op
from tenfold.kernels import paged_flash_attention
from tenfold.kernels.attention import AttentionSpec, on_gpu
from tenfold.kernels.paged_flash_attention import attend_pages
from tests.kernels.test_paged_attention import Case, Sizes, length, packed, sinks_of

CASES = [
    (Sizes(96, 6, 16, 1, 3, "int8"), AttentionSpec(0.3, window=60, chunk=37)),
    pytest.param(Sizes(96, 6, 16, 2, 2), AttentionSpec(0.3, softcap=3.0), marks=pytest.mark.slow),
    pytest.param(Sizes(96, 6, 32, 1, 3), AttentionSpec(0.3, window=40), marks=pytest.mark.slow),
    pytest.param(Sizes(96, 6, 16, 2, 2, "float8_e4m3fn"), AttentionSpec(0.3), marks=pytest.mark.slow),
]


@partial(jax.jit, static_argnames=("spec", "size", "decode_only"))
def attend(q: Any, cache: Any, batch: Any, sinks: Any, *, spec: AttentionSpec, size: int, decode_only: bool) -> Any:
    read = partial(attend_pages, cache=cache, sinks=sinks, spec=spec, interpret=not on_gpu())
    return op.attend_at_once(read, q, batch, size, decode_only=decode_only)


@pytest.fixture(scope="module", autouse=True)
def short_spans() -> Iterator[None]:
    """So that sequences have several, and the longest more than there may be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_flash_attention, "SHORTEST_SPAN", 48)
        patch.setattr(paged_flash_attention, "MOST_SPANS", 5)
        yield


def check(case: Case, spec: AttentionSpec, *, decode_only: bool = False) -> None:
    sinks = sinks_of(case.sizes)
    out = attend(case.q, case.cache, case.batch, sinks, spec=spec, size=8, decode_only=decode_only)
    expected = case.expected(spec, sinks)
    np.testing.assert_allclose(np.asarray(out)[: len(expected)], expected, rtol=2e-5, atol=2e-5)
    assert np.isfinite(out).all()


@pytest.mark.parametrize(("sizes", "spec"), CASES)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**16), lengths=st.lists(length, min_size=1, max_size=6))
def test_any_ragged_batch_equals_dense_attention(
    sizes: Sizes, spec: AttentionSpec, seed: int, lengths: list[tuple[int, int]]
) -> None:
    check(Case(seed, sizes, packed(lengths, sizes)), spec)


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [(Sizes(6, 6, 16, 2, 2), AttentionSpec(0.3, window=200)), (Sizes(6, 6, 16, 1, 3), AttentionSpec(0.3))],
)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**16), totals=st.lists(st.integers(1, 390), min_size=1, max_size=6))
def test_any_decoding_batch_equals_dense_attention(
    sizes: Sizes, spec: AttentionSpec, seed: int, totals: list[int]
) -> None:
    check(Case(seed, sizes, [(total, 1) for total in totals]), spec, decode_only=True)
