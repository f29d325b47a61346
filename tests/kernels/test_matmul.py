import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.kernels import matmul, native
from tenfold.kernels.matmul import QuantizedWeight, lookup, pack

needs_native = pytest.mark.skipif(native.library() is None, reason="the native kernels are not built")
packed_product = jax.jit(lambda x, weight: matmul.matmul(x, pack(weight), dtype="float32")[0])
look_up = jax.jit(lookup, static_argnums=2)
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 300), st.integers(1, 100))  # M, D, N


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def quantized(
    rng: np.random.Generator, D: int, N: int, bits: int, group: int, *, affine: bool
) -> tuple[QuantizedWeight, np.ndarray]:
    """A random quantised weight and its values, computed in float64 from the definition."""
    codes = rng.integers(0, 2**bits, (D, N)).astype(np.uint8)
    scales = rng.uniform(0.001, 0.1, (D // group, N)).astype(np.float32)
    mins = rng.uniform(-0.5, 0.5, scales.shape).astype(np.float32) if affine else None
    zero = 0 if affine else 2 ** (bits - 1)
    wide = np.repeat(scales.astype(np.float64), group, axis=0)
    values = wide * (codes.astype(np.float64) - zero)
    if mins is not None:
        values -= np.repeat(mins.astype(np.float64), group, axis=0)
    stored = codes if bits == 8 else codes[0::2] | (codes[1::2] << 4)
    weight = QuantizedWeight(
        codes=jnp.asarray(stored),
        scales=jnp.asarray(scales),
        mins=None if mins is None else jnp.asarray(mins),
        bits=bits,
        zero=zero,
        dims=(N,),
    )
    return weight, values


def rounded(x: np.ndarray, group: int) -> np.ndarray:
    """Activations rounded to 8 bits: 127 steps up to each group's largest, halves away from zero."""
    M, D = x.shape
    padded = np.pad(x, ((0, 0), (0, -D % group))).reshape(M, -1, group).astype(np.float32)
    peak = np.abs(padded).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    scaled = padded * inverse
    codes = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    return (codes.astype(np.float64) * (peak / np.float32(127))).reshape(M, -1)[:, :D]


# --- plain weights --------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(("activations", "weights"), [("float32",) * 2, ("bfloat16",) * 2, ("float32", "bfloat16")])
@settings(deadline=None, max_examples=15)
@given(SIZES, st.integers(0, 99))
def test_native_products_are_the_matrices_products(activations, weights, sizes, seed):
    M, D, N = sizes
    rng = np.random.default_rng(seed)
    x, w = jnp.asarray(draw(rng, M, D), activations), jnp.asarray(draw(rng, D, N), weights)
    y = packed_product(x, w)
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    # A sum of D products is off by at most D roundings of the sum of their magnitudes.
    bound = D * 2.0**-24 * (np.abs(x64) @ np.abs(w64)) + 1e-30
    assert (np.abs(np.asarray(y, np.float64) - x64 @ w64) <= bound).all()


@needs_native
def test_results_are_rounded_to_the_nearest_bfloat16():
    rng = np.random.default_rng(0)
    x, w = jnp.asarray(draw(rng, 3, 64), "bfloat16"), jnp.asarray(draw(rng, 64, 40), "bfloat16")
    (wide,), (narrow,) = matmul.matmul(x, pack(w), dtype="float32"), matmul.matmul(x, pack(w))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@needs_native
def test_several_weights_at_once_give_what_each_gives_alone():
    rng = np.random.default_rng(1)
    x = jnp.asarray(draw(rng, 5, 96))
    plain = jnp.asarray(draw(rng, 96, 33))
    eight, _ = quantized(rng, 96, 64, 8, 32, affine=False)
    weights = [pack(plain), pack(jnp.asarray(draw(rng, 96, 7))), plain, pack(eight), pack(eight)]
    together = matmul.matmul(x, *weights)
    for weight, y in zip(weights, together, strict=True):
        np.testing.assert_array_equal(y, matmul.matmul(x, weight)[0])


# --- quantised weights ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([4, 8]), st.sampled_from([8, 32, 128]), st.integers(1, 4), st.integers(1, 70), st.booleans())
def test_dequantisation_follows_its_definition(bits, group, groups, N, affine):
    weight, values = quantized(np.random.default_rng(N), group * groups, N, bits, group, affine=affine)

    @jax.jit
    def numbers(weight):
        return weight.dequantize("float32"), matmul.reference(jnp.eye(group * groups), weight)

    for each in numbers(weight):
        np.testing.assert_allclose(each, values, rtol=1e-6, atol=1e-6)


@needs_native
@pytest.mark.usefixtures("instruction_set")
@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 40),
    st.sampled_from([(8, 5), (32, 4), (64, 3), (128, 2), (256, 2)]),
    st.integers(1, 100),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
)
def test_native_quantised_products_round_only_the_activations(M, grouping, N, bits, affine, dtype):
    group, groups = grouping
    D = group * groups
    rng = np.random.default_rng(M + N)
    weight, values = quantized(rng, D, N, bits, group, affine=affine)
    x = jnp.asarray(draw(rng, M, D), dtype)
    y = packed_product(x, weight)
    seen = rounded(np.asarray(x, np.float32), min(group, 128))
    # Integers are exact, so what is left is one rounding or two for each group's part, and their sum's.
    zero = values.min(0, initial=0) - values.max(0, initial=0)
    bound = 4 * (groups * max(1, group // 128) + 2) * 2.0**-24 * (np.abs(seen) @ (np.abs(values) + np.abs(zero))) + 1e-6
    assert (np.abs(np.asarray(y, np.float64) - seen @ values) <= bound).all()


@needs_native
@pytest.mark.parametrize("D", [40, 100, 200, 1000])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_for_all_inputs_works_with_any_number_of_them(D, bits):
    rng = np.random.default_rng(D)
    weight, values = quantized(rng, D, 50, bits, D, affine=False)
    x = draw(rng, 6, D)
    (y,) = matmul.matmul(jnp.asarray(x), pack(weight))
    np.testing.assert_allclose(y, rounded(x, 128) @ values, rtol=1e-4, atol=1e-4 * np.abs(values).max() * D**0.5)


@needs_native
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(value):
    rng = np.random.default_rng(0)
    weight, _ = quantized(rng, 64, 40, 8, 32, affine=False)
    x = draw(rng, 3, 64)
    x[1, 5] = value
    (y,) = matmul.matmul(jnp.asarray(x), pack(weight))
    assert np.isfinite(y[jnp.array([0, 2])]).all()
    assert not np.isfinite(y[1]).any()


# --- what the engine's promise rests on -----------------------------------------------------------------------------


def formats(rng: np.random.Generator, D: int, N: int) -> list[matmul.PackedWeight]:
    plain = jnp.asarray(draw(rng, D, N))
    made = [pack(plain), pack(plain.astype("bfloat16"))]
    for bits, affine in itertools.product((4, 8), (False, True)):
        made.append(pack(quantized(rng, D, N, bits, 32, affine=affine)[0]))
    return made


@needs_native
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(deadline=None, max_examples=10)
@given(st.integers(1, 300), st.integers(1, 5), st.integers(0, 99))
def test_a_row_is_bit_identical_alone_and_in_any_batch(dtype, rows, blocks, seed):
    rng = np.random.default_rng(seed)
    D, N = 32 * blocks, 70
    x = draw(rng, rows, D)
    weights = [w for w in formats(rng, D, N) if not (dtype == "bfloat16" and w.bits == 32)]

    @jax.jit
    def by_each(x, weights):
        return [matmul.matmul(x, weight)[0] for weight in weights]

    whole = jax.device_get(by_each(jnp.asarray(x, dtype), weights))
    for row in {0, rows // 2, rows - 1}:
        alone = jax.device_get(by_each(jnp.asarray(x[row : row + 1], dtype), weights))
        for one, several in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(one[0], several[row])


# --- columns of a weight --------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("D", [64, 96])
def test_columns_are_found_in_every_format(D):
    rng = np.random.default_rng(2)
    columns = jnp.array([0, 69, 31, 32, 31])
    plain = jnp.asarray(draw(rng, D, 70))
    for weight in (plain, plain.astype("bfloat16")):
        expected = np.asarray(weight.T[columns], np.float32)
        np.testing.assert_array_equal(look_up(pack(weight), columns, "float32"), expected)
        np.testing.assert_array_equal(look_up(weight.T, columns, "float32"), expected)
    for bits, affine, group in itertools.product((4, 8), (False, True), (32, D)):
        weight, values = quantized(rng, D, 70, bits, group, affine=affine)
        for each in (weight, pack(weight)):
            np.testing.assert_allclose(look_up(each, columns, "float32"), values.T[columns], rtol=1e-6, atol=1e-6)


@needs_native
def test_a_weight_that_does_not_fit_is_refused():
    packed = pack(jnp.ones((64, 32)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="wrong size"):
        jax.block_until_ready(matmul.matmul(jnp.ones((2, 63)), packed))
