"""The kernels of training's attention on a GPU, interpreted where there is none: against the definition, and its
gradients."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from tenfold.kernels.attention import AttentionSpec, on_gpu, packed_attention
from tenfold.kernels.flash_attention import Tile, Tiles, first_seen, flash_attention
from tenfold.nn.packed import attend_tiles
from tenfold.parallel.layout import Layout
from tenfold.parallel.mesh import parse_mesh
from tenfold.parallel.sharding import make_mesh

SQUARE = Tile(16, 16, 4, 2)
WIDE, TALL = Tile(16, 32, 4, 2), Tile(32, 16, 4, 2)

# (rows, length, query heads, key heads, head dim), what attention does, and tiles.
CASES = [
    ((2, 70, 4, 2, 8), AttentionSpec(0.3, window=9, softcap=2.0), Tiles(TALL, WIDE, TALL)),
    pytest.param((2, 48, 3, 1, 16), AttentionSpec(0.25), Tiles(SQUARE, SQUARE, SQUARE), marks=pytest.mark.slow),
    pytest.param((1, 75, 2, 2, 12), AttentionSpec(0.3, chunk=7), Tiles(WIDE, TALL, WIDE), marks=pytest.mark.slow),
]


def inputs(sizes: tuple[int, ...], seed: int, density: float) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Queries, keys, values and sinks; segments; and what the output is multiplied with."""
    R, L, H, J, K = sizes
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((R, L, H, K), *[(R, L, J, K)] * 2, (H,))]
    segments = np.cumsum(rng.random((R, L)) < density, axis=1).astype(np.int32)
    return arrays, segments, rng.standard_normal((R, L, H, K)).astype(np.float32)


@partial(jax.jit, static_argnames=("spec", "tiles"))
def results(arrays: list[Any], segments: Any, weights: Any, *, spec: AttentionSpec, tiles: Tiles | None) -> Any:
    """The output, and the gradients of everything that is differentiable."""

    def total(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        if tiles is None:
            out = packed_attention(q, k, v, segments, spec, sinks)
        else:
            out = flash_attention(q, k, v, segments, spec, sinks, tiles=tiles, interpret=not on_gpu())
        return (out * weights).sum(), out

    gradients, out = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)
    return out, gradients


@pytest.mark.parametrize(("sizes", "spec", "tiles"), CASES)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**16), density=st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_equals_the_definition_and_its_gradient(
    sizes: tuple[int, ...], spec: AttentionSpec, tiles: Tiles, seed: int, density: float
) -> None:
    arrays, segments, weights = inputs(sizes, seed, density)
    wanted = results(arrays, segments, weights, spec=spec, tiles=None)
    found = results(arrays, segments, weights, spec=spec, tiles=tiles)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, wanted)


@pytest.mark.slow
def test_products_with_the_hessian_and_gradients_of_each_row() -> None:
    arrays, segments, weights = inputs((3, 20, 4, 2, 8), 0, 0.1)
    q, k, v, sinks = map(jnp.asarray, arrays)
    spec = AttentionSpec(0.3, window=9)

    def derivatives(attend: Any) -> Any:
        def total(inputs: Any, segments: Any, weights: Any) -> Any:
            q, k, v, sinks = inputs
            return (attend(q[None], k[None], v[None], segments[None], spec, sinks)[0] * weights).sum()

        def product(inputs: Any) -> Any:
            gradients = jax.vmap(jax.grad(total), in_axes=((0, 0, 0, None), 0, 0))
            return gradients(inputs, jnp.asarray(segments), jnp.asarray(weights))

        given = q, k, v, sinks
        return jax.jit(lambda given: jax.jvp(product, (given,), (jax.tree.map(jnp.cos, given),)))(given)

    flash = partial(flash_attention, tiles=Tiles(SQUARE, SQUARE, SQUARE), interpret=not on_gpu())
    found, wanted = derivatives(flash), derivatives(packed_attention)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), found, wanted)


seen_from = jax.jit(first_seen, static_argnums=1)


@settings(max_examples=50)
@given(
    starts=st.sets(st.integers(1, 30)),
    window=st.sampled_from([None, 1, 5]),
    chunk=st.sampled_from([None, 1, 4]),
)
def test_what_a_token_sees_begins_where_the_formula_says(
    starts: set[int], window: int | None, chunk: int | None
) -> None:
    segments = np.cumsum(np.isin(np.arange(31), list(starts))).astype(np.int32)
    found = np.asarray(seen_from(segments[None], AttentionSpec(1.0, window=window, chunk=chunk)))[0]
    for at, first in enumerate(found):
        begin = int(np.argmax(segments == segments[at]))
        seen = [
            key
            for key in range(begin, at + 1)
            if (window is None or at - key < window)
            and (chunk is None or (at - begin) // chunk == (key - begin) // chunk)
        ]
        assert first == seen[0] and seen == list(range(first, at + 1))


@pytest.mark.skipif(on_gpu(), reason="needs four devices, which a CPU has")
@pytest.mark.parametrize("mesh", ["data=2,tensor=2", pytest.param("fsdp=4", marks=pytest.mark.slow)])
def test_rows_and_heads_are_shared_out(mesh: str) -> None:
    layout = Layout(make_mesh(parse_mesh(mesh, 4)))
    assert layout.mesh is not None
    arrays, segments, _ = inputs((4, 20, 4, 2, 8), 0, 0.1)
    spec = AttentionSpec(0.3, window=9)
    q, k, v, sinks = map(jnp.asarray, arrays)
    wanted = packed_attention(q, k, v, jnp.asarray(segments), spec, sinks)
    run = jax.jit(partial(attend_tiles, spec=spec, layout=layout, interpret=True))
    rows = NamedSharding(layout.mesh, PartitionSpec(layout.row_axes))
    found = run(*jax.device_put((q, k, v, segments), rows), sinks=sinks)
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    assert found.sharding.spec[0] in (layout.row_axes, *layout.row_axes)
