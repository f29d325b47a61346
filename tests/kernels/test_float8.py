"""Products in 8-bit floats against their formula in NumPy, in float64 over operands that `ml_dtypes` rounds."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import float8
from tenfold.kernels.matmul import AdaptedWeight, Float8Weight, matmul

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
EPSILON = 2.0**-23  # of float32, twice the error of a sum's each step

SHAPES = [(1, 1, 1), (5, 16, 7), (33, 24, 48)]


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x in 8 bits, as the numbers that those are: under the least power of two that makes no number too large."""
    x = x.astype(np.float64)
    mantissa, exponent = np.frexp(np.abs(x).max() / LARGEST[dtype])
    scale = 2.0 ** max(int(exponent) - (mantissa == 0.5), -126)
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


def draw(seed: int, *shape: int, power: int = 0, zeros: float = 0.0, spread: float = 1.0) -> np.ndarray:
    """Numbers around 2^power, some of them zero, and others much smaller or larger."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape))
    return (x * (rng.random(shape) >= zeros) * 2.0**power).astype(np.float32)


@functools.partial(jax.jit, static_argnames="dtype")
def both_ways(x: Any, ws: Any, to_ys: Any, dtype: Any = jnp.float32) -> Any:
    ys, back = jax.vjp(lambda x, ws: float8.products(x, *ws, dtype=dtype), x, ws)
    return ys, *back(to_ys)


def close(found: Any, a: np.ndarray, b: np.ndarray) -> None:
    """Whether it is a · b but for the rounding of sums in float32."""
    bound = (a.shape[1] + 1) * EPSILON * (np.abs(a) @ np.abs(b)) + 2.0**-126
    assert found.dtype == jnp.float32
    assert (np.abs(np.asarray(found, np.float64) - a @ b) <= bound).all()


@settings(max_examples=60)
@given(
    st.sampled_from(SHAPES),
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.integers(-40, 40)] * 3),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 1.0, 4.0]),
)
def test_products_and_their_gradients_are_those_of_rounded_operands(
    shape: tuple[int, int, int], seed: int, powers: tuple[int, int, int], zeros: float, spread: float
) -> None:
    M, D, N = shape
    x = draw(seed, M, D, power=powers[0], zeros=zeros, spread=spread)
    w = draw(seed + 1, D, N, power=powers[1], spread=spread)
    to_y = draw(seed + 2, M, N, power=powers[2], zeros=zeros, spread=spread)
    (y,), to_x, (to_w,) = both_ways(x, (w,), (to_y,))
    x8, w8, to_y8 = rounded(x, E4M3), rounded(w, E4M3), rounded(to_y, E5M2)
    close(y, x8, w8)
    close(to_x, to_y8, w8.T)
    close(to_w, x8.T, to_y8)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power", [-100, 0, 100])
def test_numbers_are_rounded_once_to_the_nearest_and_ties_to_even(dtype: np.dtype, power: int) -> None:
    """All numbers of a format, those halfway between two, and their neighbours; the largest of all is the format's, or
    one just below or above that."""
    numbers = np.arange(0x7C if dtype == E5M2 else 0x7F, dtype=np.uint8).view(dtype).astype(np.float32)
    assert numbers[-1] == LARGEST[dtype] and (np.diff(numbers) > 0).all()
    ties = (numbers[1:] + numbers[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(to)) for to in (0, np.inf)]
    below, above = (np.nextafter(numbers[-1:], np.float32(to)) for to in (0, np.inf))
    for largest in (numbers[-1:], below, above):
        x = np.concatenate([*beside, ties, numbers[:-1], largest]) * np.float32(2.0**power)
        x = np.stack([x, -x])
        found = round_to(jnp.dtype(dtype), x)
        assert found.codes.dtype == dtype
        np.testing.assert_array_equal(
            np.asarray(found.codes).astype(np.float64) * np.float64(found.scale), rounded(x, dtype)
        )


round_to = jax.jit(float8.round_to, static_argnums=0)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_smallest_and_the_largest_numbers(dtype: np.dtype, value: float) -> None:
    x = np.full((2, 3), value, np.float32)
    found = round_to(jnp.dtype(dtype), x)
    assert np.isfinite(found.scale) and found.scale >= 2.0**-126
    off = np.abs(np.asarray(found.codes).astype(np.float64) * np.float64(found.scale) - x.astype(np.float64))
    assert (off <= max(value * (2.0**-4 if dtype == E4M3 else 2.0**-3), 2.0**-126)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_or_infinite_is_seen_in_all_products(bad: float) -> None:
    M, D, N = 5, 16, 7
    x, w, to_y = draw(0, M, D), draw(1, D, N), draw(2, M, N)
    for i, spoiled in enumerate((x, w, to_y)):
        given: list[Any] = [x, w, to_y]
        given[i] = spoiled.copy()
        given[i][1, 2] = bad
        (y,), to_x, (to_w,) = both_ways(given[0], (given[1],), (given[2],))
        assert np.isnan(y).all() == (i < 2)
        assert np.isnan(to_x).all() == (i > 0)
        assert np.isnan(to_w).all() == (i != 1)


def test_results_and_gradients_have_the_dtypes_of_what_they_are_of() -> None:
    M, D, N = 33, 24, 48
    x, w, to_y = (jnp.asarray(draw(i, *shape), "bfloat16") for i, shape in enumerate(((M, D), (D, N), (M, N))))
    (y,), to_x, (to_w,) = both_ways(x, (w,), (to_y,), jnp.bfloat16)
    assert y.dtype == to_x.dtype == to_w.dtype == jnp.bfloat16
    x8, w8, to_y8 = (rounded(np.asarray(a, np.float32), t) for a, t in ((x, E4M3), (w, E4M3), (to_y, E5M2)))
    for found, a, b in ((y, x8, w8), (to_x, to_y8, w8.T), (to_w, x8.T, to_y8)):
        bound = 2.0**-8 * np.abs(a @ b) + (a.shape[1] + 1) * 2.0**-23 * (np.abs(a) @ np.abs(b))  # rounded once
        assert (np.abs(np.asarray(found).astype(np.float64) - a @ b) <= bound).all()
    mixed = both_ways(x, (w.astype(jnp.float32),), (to_y.astype(jnp.float32),))
    assert [leaf.dtype for leaf in jax.tree.leaves(mixed)] == [jnp.float32, jnp.bfloat16, jnp.float32]


def test_several_weights_at_once_are_each_alone() -> None:
    x, ws = draw(0, 5, 16), (draw(1, 16, 7), draw(2, 16, 3, power=4))
    to_ys = (draw(3, 5, 7), draw(4, 5, 3))
    ys, to_x, to_ws = both_ways(x, ws, to_ys)
    alone = [both_ways(x, (w,), (to_y,)) for w, to_y in zip(ws, to_ys, strict=True)]
    for y, to_w, one in zip(ys, to_ws, alone, strict=True):
        np.testing.assert_array_equal(y, one[0][0])
        np.testing.assert_array_equal(to_w, one[2][0])
    np.testing.assert_allclose(to_x, alone[0][1] + alone[1][1], rtol=1e-6)


def test_weights_of_several_dims_next_to_plain_and_adapted_ones() -> None:
    x, q, k = draw(0, 5, 16), draw(1, 16, 4, 2), draw(2, 16, 6)
    a, b = draw(3, 16, 2), draw(4, 2, 6)
    adapted = AdaptedWeight(base=Float8Weight(jnp.asarray(k)), a=jnp.asarray(a), b=jnp.asarray(b), scale=0.5)
    found = matmul(jnp.asarray(x), Float8Weight(jnp.asarray(q)), jnp.asarray(k), adapted)
    x8 = rounded(x, E4M3)
    close(found[0], x8, rounded(q.reshape(16, 8), E4M3))
    close(found[1], x.astype(np.float64), k.astype(np.float64))
    np.testing.assert_allclose(found[2], x8 @ rounded(k, E4M3) + 0.5 * (x @ a) @ b, rtol=0, atol=1e-4)


def operands(lowered: str) -> list[tuple[str, str, str]]:
    """The element types of the operands and of the result of each product in a program."""
    types = re.compile(
        r"stablehlo\.dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>"
    )
    return types.findall(lowered)


def test_programs_have_8_bit_products_whose_result_is_scaled() -> None:
    """What XLA's GemmRewriter makes an 8-bit product of cuBLASLt of, at most one of whose operands may be e5m2: a `dot`
    of 8-bit operands, times a scalar."""
    x, w, to_y = (jnp.asarray(draw(i, *shape), "bfloat16") for i, shape in enumerate(((32, 16), (16, 48), (32, 48))))
    text = jax.jit(both_ways, static_argnames="dtype").lower(x, (w,), (to_y,), jnp.bfloat16).as_text()
    forward, back = ("f8E4M3FN", "f8E4M3FN", "bf16"), {("f8E5M2", "f8E4M3FN", "bf16"), ("f8E4M3FN", "f8E5M2", "bf16")}
    found = operands(text)
    assert len(found) == 3 and found[0] == forward and set(found[1:]) == back


class Device:
    """What `has_units` reads of a device."""

    def __init__(self, platform: str, device_kind: str, compute_capability: str = "") -> None:
        self.platform, self.device_kind, self.compute_capability = platform, device_kind, compute_capability


@pytest.mark.parametrize(
    ("device", "has"),
    [
        (Device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"), False),
        (Device("gpu", "NVIDIA L4", "8.9"), True),
        (Device("gpu", "NVIDIA H100 80GB HBM3", "9.0"), True),
        (Device("gpu", "NVIDIA B200", "10.0"), True),
        (Device("gpu", "AMD Instinct MI300X", "gfx942"), False),
        (Device("gpu", "AMD Instinct MI350X", "gfx950"), True),
        (Device("tpu", "TPU v6 lite"), False),
        (Device("tpu", "TPU7x"), True),
        (Device("cpu", "cpu"), False),
    ],
)
def test_which_devices_have_units(device: Any, has: bool) -> None:
    assert float8.has_units(device) == has
