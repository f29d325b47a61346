"""Every block format against the reader that ggml's authors publish (the package `gguf`), bit for bit."""

import gguf as library
import ml_dtypes
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tenfold.base import ggml_blocks
from tenfold.base.ggml_blocks import FLOATS, GGMLType

FEW = settings(max_examples=25)  # of every format, each of many blocks
BLOCKS = [kind for kind in GGMLType if kind not in FLOATS]
SYMMETRIC = {GGMLType.Q8_0, GGMLType.Q4_0, GGMLType.Q5_0, GGMLType.Q3_K, GGMLType.Q6_K, GGMLType.MXFP4}

TWICE_FP4 = {sign * int(2 * weight) for weight in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for sign in (1, -1)}
"""OCP Microscaling Formats 1.0, table 5: the values of e2m1, doubled."""


def expected(raw: np.ndarray, kind: GGMLType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(raw, library.GGMLQuantizationType(int(kind)))


def assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to the last bit and sign; which NaN stands where there is none does not matter."""
    assert found.dtype == wanted.dtype == np.float32
    missing = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(found), missing)
    np.testing.assert_array_equal(found.view(np.uint32)[~missing], wanted.view(np.uint32)[~missing])


@st.composite
def rows_of_bytes(draw: st.DrawFn, kind: GGMLType) -> np.ndarray:
    """Rows of up to three blocks, of any bytes at all: scales may be zero, negative, infinite or NaN."""
    leading = draw(hnp.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=3))
    columns = draw(st.integers(1, 3)) * ggml_blocks.block_size(kind)
    size = ggml_blocks.row_size(kind, columns)
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    return random.integers(0, 256, (*leading, size), np.uint8)


@pytest.mark.parametrize("kind", GGMLType, ids=lambda kind: kind.name)
@FEW
@given(data=st.data())
def test_dequantised_as_published(kind: GGMLType, data: st.DataObject) -> None:
    raw = data.draw(rows_of_bytes(kind))
    assert_same_bits(ggml_blocks.dequantize(raw, kind), expected(raw, kind))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_many_blocks(kind: GGMLType) -> None:
    raw = np.random.default_rng(7).integers(0, 256, (50, ggml_blocks.row_size(kind, 2048)), np.uint8)
    assert_same_bits(ggml_blocks.dequantize(raw, kind), expected(raw, kind))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
@FEW
@given(data=st.data())
def test_parts_are_the_weights(kind: GGMLType, data: st.DataObject) -> None:
    """scale · code - minimum, in float64, is the published float32 weight to within its last place."""
    raw = data.draw(rows_of_bytes(kind))
    affine = ggml_blocks.unpack(raw, kind)
    columns = affine.codes.shape[-1]
    assert affine.scales.shape == (*raw.shape[:-1], columns // affine.group)
    assert affine.scales.dtype == np.float32
    assert (affine.minima is None) == (kind in SYMMETRIC)
    if affine.minima is None:
        assert affine.codes.dtype == np.int8
        assert affine.codes.min() >= -(2 ** (affine.bits - 1))
        assert affine.codes.max() < 2 ** (affine.bits - 1)
    else:
        assert affine.codes.dtype == np.uint8
        assert affine.codes.max() < 2**affine.bits
    minima = np.zeros_like(affine.scales) if affine.minima is None else affine.minima
    with np.errstate(all="ignore"):
        scales, minima = (np.repeat(part.astype(np.float64), affine.group, axis=-1) for part in (affine.scales, minima))
        exact = (scales * affine.codes - minima).astype(np.float32)
    wanted = expected(raw, kind)
    usable = np.isfinite(wanted)
    np.testing.assert_array_max_ulp(exact[usable], wanted[usable], maxulp=1)


def test_codes_fill_their_range() -> None:
    for kind in BLOCKS:
        raw = np.random.default_rng(1).integers(0, 256, (64, ggml_blocks.row_size(kind, 1024)), np.uint8)
        affine = ggml_blocks.unpack(raw, kind)
        low = -(2 ** (affine.bits - 1)) if kind in SYMMETRIC else 0
        wanted = TWICE_FP4 if kind == GGMLType.MXFP4 else set(range(low, low + 2**affine.bits))
        assert set(np.unique(affine.codes).tolist()) == wanted, kind


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_rows_are_independent(kind: GGMLType) -> None:
    """So a slice of rows, or rows in another order, can be taken before unpacking."""
    raw = np.random.default_rng(3).integers(0, 256, (2, 6, ggml_blocks.row_size(kind, 512)), np.uint8)
    whole, part = ggml_blocks.unpack(raw, kind), ggml_blocks.unpack(raw[1, 4:0:-2], kind)
    np.testing.assert_array_equal(part.codes, whole.codes[1, 4:0:-2])
    np.testing.assert_array_equal(part.scales, whole.scales[1, 4:0:-2])
    assert raw.base is None
    assert not np.shares_memory(whole.codes, raw)


@pytest.mark.parametrize(
    ("kind", "raw", "weights"),
    [
        # scale 2; the low nibbles are the first half: 0 and 15 are -8 and 7
        (GGMLType.Q4_0, "0040" + "f0" * 16, [-16.0] * 16 + [14.0] * 16),
        # scale 0.5, minimum 1
        (GGMLType.Q4_1, "0038003c" + "21" * 16, [1.5] * 16 + [2.0] * 16),
        # all fifth bits of the first half: codes 16 + 1 and 2, less 16
        (GGMLType.Q5_0, "003cffff0000" + "21" * 16, [1.0] * 16 + [-14.0] * 16),
        (GGMLType.Q8_0, "00bc" + "7f80" * 16, [-127.0, 128.0] * 16),
    ],
)
def test_blocks_by_hand(kind: GGMLType, raw: str, weights: list[float]) -> None:
    block = np.frombuffer(bytes.fromhex(raw), np.uint8)[None]
    assert ggml_blocks.dequantize(block, kind)[0].tolist() == weights


def normal_floats(columns: int) -> st.SearchStrategy[np.ndarray]:
    element = st.floats(-(2.0**13), 2.0**13, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-20)
    return hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.just(columns)), elements=element)


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q4_0])
@FEW
@given(values=normal_floats(64))
def test_quantised_as_published(kind: GGMLType, values: np.ndarray) -> None:
    wanted = quants.quantize(values, library.GGMLQuantizationType(int(kind)))
    found = ggml_blocks.quantize(values, kind)
    np.testing.assert_array_equal(found, wanted.view(np.uint8))


def test_rounding_of_halves() -> None:
    """Q8_0 rounds them away from zero, Q4_0 up."""
    values = np.array([[127.0, 0.5, -0.5, 1.5, -1.5, 2.5, *[0.0] * 26]], np.float32)
    codes = ggml_blocks.unpack(ggml_blocks.quantize(values, GGMLType.Q8_0), GGMLType.Q8_0).codes
    assert codes[0, :6].tolist() == [127, 1, -1, 2, -2, 3]
    values = np.array([[-8.0, 0.5, -0.5, 1.5, -1.5, 8.0, *[0.0] * 26]], np.float32)
    codes = ggml_blocks.unpack(ggml_blocks.quantize(values, GGMLType.Q4_0), GGMLType.Q4_0).codes
    assert codes[0, :6].tolist() == [-8, 1, 0, 2, -1, 7]


@given(values=normal_floats(64))
def test_eight_bits_are_close(values: np.ndarray) -> None:
    found = ggml_blocks.dequantize(ggml_blocks.quantize(values, GGMLType.Q8_0), GGMLType.Q8_0)
    largest = np.abs(values.reshape(-1, 32)).max(axis=1)
    # half a step, and what rounding the scale to float16 moves the largest code by
    bound = largest / 127 * 0.501 + largest * 2.0**-11 + 127 * 2.0**-25
    assert (np.abs(found - values).reshape(-1, 32).max(axis=1) <= bound).all()


def test_bfloat16_comes_as_it_is() -> None:
    values = np.array([[1.0, -2.5, 3.0, 0.0]], ml_dtypes.bfloat16)
    raw = ggml_blocks.quantize(values, GGMLType.BF16)
    assert raw.tobytes() == values.tobytes()
    assert ggml_blocks.dequantize(raw, GGMLType.BF16).tolist() == [[1.0, -2.5, 3.0, 0.0]]


def test_sizes_are_those_of_the_library() -> None:
    for kind in GGMLType:
        block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType(int(kind))]
        assert ggml_blocks.block_size(kind) == block
        assert ggml_blocks.row_size(kind, 3 * block) == 3 * size
    names = {kind.value: kind.name for kind in library.GGMLQuantizationType}
    known = {kind.value: kind.name for kind in GGMLType} | ggml_blocks.OTHER_TYPES
    assert {number: names.get(number) for number in known} == known


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 48 weights is not a whole number of Q4_0 blocks: 32"):
        ggml_blocks.row_size(GGMLType.Q4_0, 48)
    with pytest.raises(ValueError, match="a row of 35 bytes is not a whole number of Q8_0 blocks"):
        ggml_blocks.unpack(np.zeros((2, 35), np.uint8), GGMLType.Q8_0)
    with pytest.raises(ValueError, match="BF16 has no blocks to unpack"):
        ggml_blocks.unpack(np.zeros((2, 34), np.uint8), GGMLType.BF16)
    with pytest.raises(ValueError, match="quantising to Q4_K is not implemented"):
        ggml_blocks.quantize(np.zeros((1, 256), np.float32), GGMLType.Q4_K)
    for value in (np.nan, np.inf, 1e30):
        with pytest.raises(ValueError, match="not finite, or too large for the scales of Q8_0"):
            ggml_blocks.quantize(np.full((1, 32), value, np.float32), GGMLType.Q8_0)
