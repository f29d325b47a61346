"""Grouped products against numpy's, group by group, and what they must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import native
from tenfold.kernels.grouped_matmul import grouped_matmul, output_dims, reference
from tenfold.kernels.matmul import QuantizedWeight, matmul, pack, pack_experts
from tenfold.nn.quantization import quantize, stack_experts

run = jax.jit(grouped_matmul)


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def by_group(x: np.ndarray, sizes: list[int], matrices: np.ndarray) -> np.ndarray:
    groups = np.split(x.astype(np.float64), np.cumsum(sizes)[:-1])
    return np.concatenate([rows @ matrix for rows, matrix in zip(groups, matrices, strict=True)])


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(0, 30), min_size=6, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_every_row_meets_the_weight_of_its_group(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes[-1] += 96 - sum(sizes) % 96  # few shapes, few compilations
    x, up, down = draw(rng, sum(sizes), 10), draw(rng, 6, 10, 2, 3), draw(rng, 6, 10, 5)
    for weight, found in zip((up, down), run(x, jnp.asarray(sizes), up, down), strict=True):
        matrices = weight.reshape(6, 10, -1)
        np.testing.assert_allclose(found, by_group(x, sizes, matrices), atol=1e-5)
        np.testing.assert_allclose(
            reference(jnp.asarray(x), jnp.asarray(sizes), jnp.asarray(weight)), by_group(x, sizes, matrices), atol=1e-5
        )


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 8)])
def test_quantised_weights_are_multiplied_as_they_are(bits: int, group: int | None) -> None:
    rng, sizes = np.random.default_rng(1), [3, 0, 20, 9]
    experts = stack_experts([quantize(jnp.asarray(draw(rng, 16, 6)), bits, group, (2, 3)) for _ in sizes])
    assert isinstance(experts, QuantizedWeight)
    assert output_dims(experts) == (2, 3)
    x = draw(rng, sum(sizes), 16)
    expected = by_group(x, sizes, np.asarray(experts.dequantize(jnp.float32)))
    np.testing.assert_allclose(run(x, jnp.asarray(sizes), experts)[0], expected, atol=1e-5)
    np.testing.assert_allclose(reference(jnp.asarray(x), jnp.asarray(sizes), experts), expected, atol=1e-5)


def test_experts_that_are_quantised_in_two_ways_are_not_stacked() -> None:
    matrix = jnp.ones((8, 4))
    assert stack_experts([quantize(matrix, 8, None), quantize(matrix, 4, None)]) is None


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("scheme", [None, (8, None), (4, 8), (8, 24)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_products_are_those_of_each_row_alone(dtype: str, scheme: tuple[int, int | None] | None) -> None:
    """To the last bit, whether groups are empty, of one row, or of more than a task has."""
    rng, sizes = np.random.default_rng(5), [3, 0, 1, 250, 2]
    x = jnp.asarray(draw(rng, sum(sizes), 24), dtype)
    matrices = [jnp.asarray(draw(rng, 24, 40), dtype) for _ in range(10)]
    experts = [w if scheme is None else quantize(w, *scheme, (40,)) for w in matrices]
    up, down = (jax.tree.map(lambda *ws: jnp.stack(ws), *part) for part in (experts[:5], experts[5:]))
    packed = [pack_experts(w, (40,)) for w in (up, down)]
    together = jax.jit(grouped_matmul)(x, jnp.asarray(sizes, jnp.int32), *packed)
    starts = np.cumsum([0, *sizes])
    for found, part in zip(together, (experts[:5], experts[5:]), strict=True):
        for e, weight in enumerate(part):
            rows = slice(int(starts[e]), int(starts[e + 1]))
            if sizes[e]:
                (alone,) = jax.jit(matmul)(x[rows], pack(weight))
                np.testing.assert_array_equal(np.asarray(found[rows], np.float32), np.asarray(alone, np.float32))


@pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("sizes", [[3, 4], [-1, 9], [9, 0]])
def test_group_sizes_that_cannot_be_are_refused(sizes: list[int]) -> None:
    packed = pack_experts(jnp.ones((2, 4, 3)), (3,))
    with pytest.raises(Exception, match="group sizes must add up to the rows"):
        jax.block_until_ready(grouped_matmul(jnp.ones((8, 4)), jnp.asarray(sizes, jnp.int32), packed))


def test_a_row_has_the_same_bits_whatever_is_beside_it() -> None:
    rng, sizes = np.random.default_rng(2), [5, 40, 1, 18]
    x, weight = draw(rng, sum(sizes), 24), draw(rng, 4, 24, 7)
    (together,) = run(x, jnp.asarray(sizes), weight)
    for row, group in ((0, 0), (4, 0), (5, 1), (30, 1), (45, 2), (63, 3)):
        others = draw(rng, *x.shape)
        others[0] = x[row]
        alone = [0] * 4
        alone[group] = 1
        alone[group - 1] += len(x) - 1  # the other rows come from elsewhere, before it or after it
        at = 0 if group == 0 else len(x) - 1
        others[[0, at]] = others[[at, 0]]
        (found,) = run(others, jnp.asarray(alone), weight)
        np.testing.assert_array_equal(found[at], together[row])


def test_weights_of_groups_without_rows_are_not_read() -> None:
    rng = np.random.default_rng(3)
    weight = draw(rng, 4, 6, 5)
    weight[[0, 2]] = np.nan
    assert np.isfinite(run(draw(rng, 11, 6), jnp.asarray([0, 7, 0, 4]), weight)[0]).all()


def test_gradients_are_those_of_the_reference() -> None:
    rng, sizes = np.random.default_rng(4), jnp.asarray([3, 0, 9])
    x, weight, given = (jnp.asarray(draw(rng, *shape)) for shape in ((12, 5), (3, 5, 4), (12, 4)))

    def loss(product: object, x: jax.Array, weight: jax.Array) -> jax.Array:
        return (product(x, sizes, weight) * given).sum()

    ours = jax.grad(lambda x, w: loss(lambda *a: grouped_matmul(*a)[0], x, w), (0, 1))(x, weight)
    theirs = jax.grad(lambda x, w: loss(reference, x, w), (0, 1))(x, weight)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.asarray(ours[1][1]).any()
