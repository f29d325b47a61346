"""Gates of feed-forwards, held to their formulas in doubles."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import native
from tenfold.kernels.gate import FUNCTIONS, gated, reference

pytestmark = pytest.mark.usefixtures("one_device")

ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
FORMULAS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def draw(seed: int, shape: tuple[int, ...], dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return jnp.asarray(4 * rng.standard_normal(shape), dtype), jnp.asarray(rng.standard_normal(shape), dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("function", FORMULAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(deadline=None, max_examples=10)
@given(st.integers(1, 20), st.integers(1, 200), st.integers(0, 99))
def test_gates_are_their_formulas(function, dtype, rows, width, seed):
    gate, up = draw(seed, (rows, width), dtype)
    out = jax.jit(gated, static_argnums=2)(gate, up, function)
    assert out.dtype == gate.dtype
    expected = FORMULAS[function](np.asarray(gate, np.float64)) * np.asarray(up, np.float64)
    # 1 + tanh cancels where x is far below 0
    bound = 8 * ROUNDING[dtype], 16 * ROUNDING["float32"]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=bound[0], atol=bound[1])


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_ends_of_what_floats_hold(function):
    gate = jnp.asarray([-jnp.inf, jnp.inf, jnp.nan, 0.0, -0.0, -3e38, 3e38, -1e4, 1e4, 1e-30, -1e-30], jnp.float32)
    up = jnp.ones_like(gate)
    ours, theirs = (np.asarray(fn(gate, up, function)) for fn in (gated, reference))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("function", FORMULAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_bit_identical_alone_and_in_any_batch(function, dtype):
    gate, up = draw(0, (300, 203), dtype)
    whole = gated(gate, up, function)
    for start, rows in ((0, 1), (3, 2), (7, 16), (100, 129)):
        part = slice(start, start + rows)
        np.testing.assert_array_equal(gated(gate[part], up[part], function), whole[part])
    np.testing.assert_array_equal(jax.vmap(lambda g, u: gated(g, u, function))(gate, up), whole)


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
def test_one_cpu_uses_the_native_operation_and_several_do_not():
    gate, up = draw(1, (4, 32), "float32")
    assert "tenfold_gate" in jax.jit(gated, static_argnums=2).lower(gate, up, "silu").as_text()
    with jax.default_device(None):
        assert jax.device_count() > 1
        assert "tenfold_gate" not in jax.jit(lambda g, u: gated(g, u, "silu")).lower(gate, up).as_text()


@pytest.mark.parametrize("function", FORMULAS)
def test_derivatives_are_those_of_the_reference(function):
    gate, up = (x / 4 for x in draw(2, (4, 32), "float32"))
    direction = draw(3, (4, 32), "float32")

    def loss(fn, gate, up):
        return jnp.sum(jnp.sin(fn(gate, up, function)))

    def gradient(fn):
        return jax.grad(lambda g, u: loss(fn, g, u), (0, 1))

    for mine, other in zip(gradient(gated)(gate, up), gradient(reference)(gate, up), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-6)
    hessians = [jax.jvp(gradient(fn), (gate, up), direction)[1] for fn in (gated, reference)]
    for mine, other in zip(*hessians, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
