"""Attention within packed rows by native operations, held to its definition."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import native
from tenfold.kernels.attention import AttentionSpec, packed_attention
from tenfold.kernels.row_attention import row_attention
from tests.kernels.test_flash_attention import inputs

pytestmark = [
    pytest.mark.usefixtures("one_device"),
    pytest.mark.skipif(native.library() is None, reason="the native kernels are not built"),
]

CASES = [  # (R, L, H, J, K), spec
    ((2, 200, 4, 2, 24), AttentionSpec(0.3)),
    ((1, 67, 3, 1, 8), AttentionSpec(0.3, window=50)),
    ((1, 300, 2, 2, 80), AttentionSpec(0.1, window=7)),
    ((2, 1, 2, 1, 16), AttentionSpec(1.0)),
]


@partial(jax.jit, static_argnames=("spec", "attend"))
def results(arrays: list[Any], segments: Any, weights: Any, *, spec: AttentionSpec, attend: Any) -> Any:
    """The output, and the gradients of queries, keys and values."""

    def total(q: Any, k: Any, v: Any) -> Any:
        out = attend(q, k, v, segments, spec)
        return (out * weights).sum(), out

    return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(*arrays)


@pytest.mark.usefixtures("instruction_set", "optimised")
@pytest.mark.parametrize(("sizes", "spec"), CASES)
@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 2**16), density=st.sampled_from([0.0, 0.02, 0.3, 1.0]))
def test_equals_the_definition_and_its_gradient(sizes: Any, spec: AttentionSpec, seed: int, density: float) -> None:
    arrays, segments, weights = inputs(sizes, seed, density)
    wanted = results(arrays[:3], segments, weights, spec=spec, attend=packed_attention)
    found = results(arrays[:3], segments, weights, spec=spec, attend=row_attention)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, wanted)


def test_tokens_of_a_segment_need_not_be_neighbours() -> None:
    arrays, _, weights = inputs((1, 150, 2, 2, 16), 0, 0.0)
    segments = np.random.default_rng(0).integers(-1, 3, (1, 150)).astype(np.int32)
    wanted = results(arrays[:3], segments, weights, spec=AttentionSpec(0.5), attend=packed_attention)
    found = results(arrays[:3], segments, weights, spec=AttentionSpec(0.5), attend=row_attention)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, wanted)


def test_products_with_the_hessian_and_gradients_of_each_row() -> None:
    drawn, *rest = inputs((3, 20, 4, 2, 8), 0, 0.1)
    (q, k, v, _), segments, weights = map(jnp.asarray, drawn), *map(jnp.asarray, rest)
    spec = AttentionSpec(0.3, window=9)

    def derivatives(attend: Any) -> Any:
        def total(given: Any, segments: Any, weights: Any) -> Any:
            q, k, v = given
            return (attend(q[None], k[None], v[None], segments[None], spec)[0] * weights).sum()

        def product(given: Any) -> Any:
            return jax.vmap(jax.grad(total))(given, segments, weights)

        def norm(q: Any) -> Any:
            return jnp.sum(jax.grad(total)((q, k[0], v[0]), segments[0], weights[0])[0] ** 2)

        given = tuple(map(jnp.asarray, (q, k, v)))
        along = jax.jvp(product, (given,), (jax.tree.map(jnp.cos, given),))
        of_queries = jax.grad(lambda q: total((q, k[0], v[0]), segments[0], weights[0]))(q[0])
        return along, of_queries, jax.grad(norm)(q[0])

    found, wanted = (jax.jit(partial(derivatives, attend))() for attend in (row_attention, packed_attention))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, wanted)


@pytest.mark.parametrize(
    "spec", [AttentionSpec(1.0, softcap=5.0), AttentionSpec(1.0, chunk=4)], ids=["soft-capped", "in chunks"]
)
def test_what_the_operation_does_not_do_is_left_to_xla(spec: AttentionSpec) -> None:
    (q, k, v, _), segments, _ = inputs((1, 9, 2, 1, 8), 0, 0.2)
    given = {"segments": jnp.asarray(segments), "spec": spec}
    given |= {name: jnp.asarray(x) for name, x in (("q", q), ("k", k), ("v", v))}
    np.testing.assert_array_equal(row_attention(**given), packed_attention(**given))
