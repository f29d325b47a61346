from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import norm
from tenfold.kernels.norm import layer_norm, rms_norm

pytestmark = pytest.mark.usefixtures("one_device")

ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(deadline=None, max_examples=10)
@given(st.integers(1, 20), st.integers(1, 200), st.integers(0, 99))
def test_rows_are_divided_by_their_root_mean_square(offset, dtype, rows, width, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((rows, width)), dtype)
    weight = jnp.asarray(rng.standard_normal(width), dtype)
    x64, w64 = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-5) * (w64 + (offset or 0))
    y = jax.jit(partial(rms_norm, eps=1e-5, offset=offset))(x, weight)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=(4 + width**0.5) * ROUNDING[dtype], atol=1e-30)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_bit_identical_alone_and_in_any_batch(dtype):
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(rng.standard_normal((300, 96)), dtype), jnp.ones(96, dtype)
    whole = rms_norm(x, weight, 1e-5)
    centered = layer_norm(x, weight, None, 1e-5)
    for start, rows in ((0, 1), (3, 2), (7, 16), (100, 129)):
        part = slice(start, start + rows)
        np.testing.assert_array_equal(rms_norm(x[part], weight, 1e-5), whole[part])
        np.testing.assert_array_equal(layer_norm(x[part], weight, None, 1e-5), centered[part])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(deadline=None, max_examples=10)
@given(st.integers(1, 20), st.integers(1, 3), st.integers(2, 200), st.booleans(), st.integers(0, 99))
def test_rows_are_centered_and_divided_by_their_deviation(dtype, rows, heads, width, by_head, seed):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(3 + rng.standard_normal((rows, heads, width)), dtype)
    shape = (heads, width) if by_head else (width,)
    weight, bias = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    x64, w64, b64 = (np.asarray(a, np.float64) for a in (x, weight, bias))
    normed = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-3)
    y = jax.jit(partial(layer_norm, eps=1e-3))(x, weight, bias)
    assert y.dtype == x.dtype
    bound = (8 + width**0.5) * ROUNDING[dtype]
    np.testing.assert_allclose(np.asarray(y, np.float64), normed * w64 + b64, rtol=bound, atol=40 * bound)
    np.testing.assert_array_equal(layer_norm(x, weight, None, 1e-3), layer_norm(x, weight, jnp.zeros_like(bias), 1e-3))


def test_derivatives_are_those_of_the_reference():
    rng = np.random.default_rng(1)
    x, weight, direction = (jnp.asarray(rng.standard_normal(shape), "float32") for shape in ((4, 32), (32,), (4, 32)))

    def loss(fn, x, weight):
        return jnp.sum(jnp.sin(fn(x, weight, 1e-5, 1.0)))

    ours, theirs = (partial(loss, fn) for fn in (rms_norm, norm.rms_reference))
    for mine, other in zip(jax.grad(ours, (0, 1))(x, weight), jax.grad(theirs, (0, 1))(x, weight), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6)
    hessians = [jax.jvp(lambda x, fn=fn: jax.grad(fn)(x, weight), (x,), (direction,))[1] for fn in (ours, theirs)]
    np.testing.assert_allclose(*hessians, rtol=1e-5, atol=1e-6)
    each = jax.vmap(jax.grad(ours), (0, None))(x[:, None], weight)
    np.testing.assert_allclose(each[:, 0], jax.grad(theirs)(x, weight), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(jax.vmap(lambda row: rms_norm(row, weight, 1e-5))(x), rms_norm(x, weight, 1e-5))


def test_derivatives_of_layer_norm_are_those_of_its_reference():
    rng = np.random.default_rng(2)
    inputs = [jnp.asarray(rng.standard_normal(shape), "float32") for shape in ((4, 32), (32,), (32,))]
    ours, theirs = (
        jax.grad(lambda *a, fn=fn: jnp.sum(jnp.sin(fn(*a, 1e-5))), (0, 1, 2))(*inputs)
        for fn in (layer_norm, norm.layer_reference)
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6)
