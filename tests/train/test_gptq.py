"""GPTQ against its definition, in float64 and without its factorisation, and against rounding to the nearest."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.base.errors import CheckpointError
from tenfold.nn.quantization import quantize
from tenfold.train.gptq import DAMPING, gptq


def correlated(rng: np.random.Generator, rows: int, D: int) -> np.ndarray:
    """Activations that a few directions explain, of sizes that differ from input to input."""
    few = rng.standard_normal((rows, max(D // 4, 1))) @ rng.standard_normal((max(D // 4, 1), D))
    return ((few + 0.3 * rng.standard_normal((rows, D))) * rng.uniform(0.2, 3, D)).astype(np.float32)


def moments_of(x: np.ndarray) -> jnp.ndarray:
    return jnp.asarray(x.T @ x)


def error(x: np.ndarray, matrix: np.ndarray, weight) -> float:
    """‖X·W - X·Q‖²."""
    return float(np.square(x @ (matrix - np.asarray(weight.dequantize(jnp.float32)))).sum())


def eliminate(matrix: np.ndarray, moments: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """The codes [D, N] by definition: before an input is rounded, it and all that are still to come are moved to where
    the error, given those rounded so far, is smallest."""
    D = len(matrix)
    H = moments.astype(np.float64)
    H = H + DAMPING[0] * np.diag(H).mean() * np.eye(D)
    order = np.argsort(-np.diag(moments), kind="stable")
    largest = 2 ** (bits - 1) - 1
    wide = np.repeat(scales.astype(np.float64), D // len(scales), axis=0)
    W = matrix.astype(np.float64)
    codes, Q = np.zeros(W.shape), np.zeros(W.shape)
    for n, i in enumerate(order):
        done, free = order[:n], order[n:]
        best = W[free] + np.linalg.solve(H[np.ix_(free, free)], H[np.ix_(free, done)] @ (W[done] - Q[done]))
        codes[i] = np.clip(np.round(best[0] / wide[i]), -largest, largest)
        Q[i] = codes[i] * wide[i]
    return codes


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([(8, 4), (12, 4), (16, None)]), st.sampled_from([4, 8]))
def test_every_code_is_that_of_the_definition(seed: int, shape: tuple[int, int | None], bits: int) -> None:
    rng = np.random.default_rng(seed)
    D, group = shape
    x, matrix = correlated(rng, 64, D), rng.standard_normal((D, 5)).astype(np.float32)
    found = gptq(jnp.asarray(matrix), moments_of(x), bits, group)
    wanted = eliminate(matrix, np.asarray(moments_of(x)), np.asarray(found.scales), bits)
    got = np.asarray(found.unpacked()).astype(int) - found.zero
    assert np.mean(got != wanted) <= 0.05  # a weight in the middle between two codes may go either way
    assert np.abs(got - wanted).max() <= 1 if bits == 4 else True


@pytest.mark.slow
@settings(max_examples=20)
@given(
    st.integers(0, 2**31), st.sampled_from([(32, 8), (64, 16), (160, 32), (200, None)]), st.just(40),
    st.sampled_from([4, 8]),
)  # fmt: skip
def test_products_are_closer_than_with_the_nearest_codes(
    seed: int, shape: tuple[int, int | None], N: int, bits: int
) -> None:
    rng = np.random.default_rng(seed)
    D, group = shape
    x, matrix = correlated(rng, 256, D), rng.standard_normal((D, N)).astype(np.float32)
    nearest = quantize(jnp.asarray(matrix), bits, group)
    found = gptq(jnp.asarray(matrix), moments_of(x), bits, group)
    assert error(x, matrix, found) < 0.8 * error(x, matrix, nearest)
    assert (found.bits, found.group, found.dims) == (nearest.bits, nearest.group, nearest.dims)


@pytest.mark.slow
@settings(max_examples=15)
@given(st.integers(0, 2**31), st.sampled_from([(7, None), (130, 10), (256, 64)]), st.sampled_from([4, 8]))
def test_uncorrelated_inputs_are_rounded_to_the_nearest(seed: int, shape: tuple[int, int | None], bits: int) -> None:
    D, group = shape
    matrix = jnp.asarray(np.random.default_rng(seed).standard_normal((D, 6)), jnp.float32)
    nearest, found = quantize(matrix, bits, group), gptq(matrix, jnp.eye(D), bits, group)
    np.testing.assert_array_equal(found.codes, nearest.codes)
    np.testing.assert_array_equal(found.scales, nearest.scales)


def test_inputs_that_were_never_active_are_rounded_to_the_nearest() -> None:
    rng = np.random.default_rng(0)
    x, matrix = correlated(rng, 64, 16), jnp.asarray(rng.standard_normal((16, 6)), jnp.float32)
    x[:, 3] = 0
    nearest, found = quantize(matrix, 8, None), gptq(matrix, moments_of(x), 8, None)
    np.testing.assert_array_equal(found.codes[3], nearest.codes[3])
    np.testing.assert_array_equal(gptq(matrix, jnp.zeros((16, 16)), 8, None).codes, nearest.codes)


def test_scales_are_those_that_the_file_can_hold() -> None:
    rng = np.random.default_rng(1)
    x, matrix = correlated(rng, 64, 32), rng.standard_normal((32, 6)).astype(np.float32)
    found = gptq(jnp.asarray(matrix), moments_of(x), 4, 8, scale_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found.scales, found.scales.astype(jnp.bfloat16).astype(jnp.float32))


def test_activations_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        gptq(jnp.ones((4, 3)), jnp.full((4, 4), jnp.nan), 4, None)
