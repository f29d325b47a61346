"""The products that training differentiates, held to numpy's and to XLA's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import native
from tenfold.kernels.product import multiply, product

pytestmark = [
    pytest.mark.usefixtures("one_device"),
    pytest.mark.skipif(native.library() is None, reason="the native kernels are not built"),
]


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.usefixtures("instruction_set", "optimised")
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 250), st.integers(1, 1100), st.integers(0, 600), st.booleans(), st.booleans(), st.integers(0, 99))
def test_a_product_is_the_sum_of_products(M: int, N: int, K: int, of_a: bool, of_b: bool, seed: int) -> None:
    a, b = draw(seed, M, K), draw(seed + 1, K, N)
    found = multiply(a.T if of_a else a, b.T if of_b else b, a_transposed=of_a, b_transposed=of_b)
    wanted = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * max(K, 1) ** 0.5 * 4)


@pytest.mark.usefixtures("instruction_set", "optimised")
def test_sums_of_many_inputs_are_made_block_by_block() -> None:
    a, b = draw(0, 30, 5000), draw(1, 5000, 40)
    wanted = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    np.testing.assert_allclose(multiply(a, b), wanted, rtol=1e-5, atol=2e-4)
    whole = np.asarray(multiply(a, b))
    np.testing.assert_array_equal(multiply(a[7:20], b[:, 3:35]), whole[7:20, 3:35])


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives_are_those_of_xla(transposed: bool) -> None:
    x, direction = draw(0, 3, 20, 24), draw(1, 3, 20, 24)
    weight = draw(2, *((40, 24) if transposed else (24, 40))) / 5

    def derivatives(multiply: Any) -> Any:
        def loss(x: Any, weight: Any) -> Any:
            return jnp.sum(jnp.sin(multiply(x, weight)))

        grad = jax.grad(loss, (0, 1))
        of_each = jax.vmap(grad, (0, None))
        of_row = jax.vmap(jax.grad(loss), (1, None))(jnp.asarray(x), weight)
        along = jax.jvp(partial(of_each), (x, weight), (direction, jnp.cos(weight)))[1]
        of_one = jax.grad(lambda weight: loss(x[0], weight))(weight)  # the other factor is not differentiated
        twice = jax.grad(lambda x: jnp.sum(grad(x, weight)[0] ** 2))(x[0])
        return of_each(x, weight), of_row, along, of_one, twice

    ours = jax.jit(lambda: derivatives(partial(product, transposed=transposed)))()
    theirs = jax.jit(lambda: derivatives(lambda x, w: jnp.matmul(x, w.T if transposed else w)))()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), ours, theirs)


def test_only_what_is_differentiated_is_native() -> None:
    x, weight = draw(0, 8, 8), draw(1, 8, 8)

    def program(function: Any, *arguments: Any) -> str:
        return jax.jit(function).lower(*arguments).as_text()

    assert "tenfold_product" not in program(product, x, weight)
    assert "tenfold_product" in program(jax.grad(lambda w: product(x, w).sum()), weight)
    half = jnp.asarray(weight, jnp.bfloat16)
    assert "tenfold_product" not in program(jax.grad(lambda w: product(jnp.asarray(x, w.dtype), w).sum()), half)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])):
        assert "tenfold_product" not in program(jax.grad(lambda w: product(x, w).sum()), weight)
