"""Each format's numbers, against its formula one weight at a time, and against what other libraries read.

The golden files are written by `tests/parity/quantized.py`.
"""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold.kernels.matmul import QuantizedWeight
from tenfold.nn import checkpoint, safetensors
from tenfold.nn.encodings import mxfp4
from tenfold.nn.stack import stack_layers
from tests.nn import quantized_files as files
from tests.nn.quantized_files import MODULE, NAME, declare, load, numbers

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
FORMATS = [path for path in GOLDEN if path.stem not in ("llama", "mxfp4")]
PLAIN = ("fp8", "float8", "gptq-int4-by-importance")  # whose scales are not those of runs of integers
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
SIZE, BITS = st.integers(1, 20), st.sampled_from([4, 8])


def read_golden(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """A checkpoint's tensors, the numbers expected of them, and its config.json."""
    file = safetensors.open(path)
    stored = {name: tensor for name, tensor in file.items() if not name.startswith("expected.")}
    expected = {name.removeprefix("expected."): tensor for name, tensor in file.items() if name not in stored}
    return stored, expected, json.loads(file.metadata["config"])


def assert_reads_as(values: np.ndarray, expected: np.ndarray) -> None:
    """Equal numbers: bit for bit where the other library rounded them to a narrow dtype at the end."""
    if expected.dtype == np.float32:
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=2e-6 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(values.astype(expected.dtype).astype(np.float32), expected.astype(np.float32))


# --- what other libraries read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FORMATS, ids=lambda path: path.stem)
def test_a_format_is_read_as_by_its_own_library(tmp_path: Path, path: Path) -> None:
    stored, expected, config = read_golden(path)
    weight = load(tmp_path, stored, config, declare(*expected[NAME].shape))["up"]
    assert_reads_as(numbers(weight), expected[NAME])
    assert isinstance(weight, QuantizedWeight) == (not path.stem.startswith(PLAIN))
    if isinstance(weight, QuantizedWeight):
        packed = path.stem.startswith(("pack-int4-", "gptq-int4", "awq"))
        odd = path.stem == "pack-int4-odd"  # inputs, of which the last has no other half of a byte
        assert weight.bits == (4 if packed and not odd else 8)
        assert (weight.mins is not None) == ("asymmetric" in path.stem or path.stem.startswith(("awq", "gptq")))


@pytest.mark.parametrize("path", FORMATS, ids=lambda path: path.stem)
def test_weights_that_are_not_for_products_come_as_numbers(tmp_path: Path, path: Path) -> None:
    stored, expected, config = read_golden(path)
    N, D = expected[NAME].shape
    plain = load(tmp_path, stored, config, declare(N, D, inputs=""))["up"]
    assert isinstance(plain, jax.Array)
    assert_reads_as(np.asarray(plain).T, expected[NAME])
    narrow = checkpoint.load(tmp_path, declare(N, D, inputs=""), "bfloat16")["up"]
    np.testing.assert_array_equal(narrow, plain.astype("bfloat16"))
    (stacked,) = jax.tree.leaves(checkpoint.load(tmp_path, stack_layers([declare(N, D)], (0,)), "float32"))
    np.testing.assert_array_equal(stacked[0], plain)


def test_mxfp4_is_read_as_by_transformers(tmp_path: Path) -> None:
    stored, expected, config = read_golden(next(path for path in GOLDEN if path.stem == "mxfp4"))
    experts = mxfp4(stored.pop("experts_blocks"), stored.pop("experts_scales"))
    np.testing.assert_array_equal(experts.values(), expected["experts"].transpose(0, 2, 1))
    first = expected["experts"][0].T
    weight = load(tmp_path, stored, config, declare(*first.shape))["up"]
    assert isinstance(weight, QuantizedWeight)
    np.testing.assert_array_equal(numbers(weight), first)


def test_mxfp4_holds_what_its_specification_says() -> None:
    """OCP MX 1.0: e2m1 has the values 0, 0.5, 1, 1.5, 2, 3, 4, 6; e8m0 is 2^(byte - 127), and 255 is not a number."""
    blocks = np.arange(16, dtype=np.uint8).reshape(1, 1, 16) * 17  # both halves of a byte alike
    magnitudes = np.repeat([0, 0.5, 1, 1.5, 2, 3, 4, 6], 2)
    for byte, scale in ((127, 1.0), (130, 8.0), (1, 2.0**-126), (255, np.nan)):
        values = mxfp4(blocks, np.array([[byte]], np.uint8)).values()
        np.testing.assert_array_equal(values[0], np.concatenate([magnitudes, -magnitudes]) * np.float32(scale))


# --- formulas -------------------------------------------------------------------------------------------------------


@FIXTURE
@given(st.integers(0, 99), SIZE, SIZE, BITS, st.sampled_from([None, 1, 2, 4, 8]), st.booleans())
def test_gptq(tmp_path: Path, seed: int, n: int, d: int, bits: int, group: int | None, v2: bool) -> None:
    """Groups that do not divide the inputs have a last one that is smaller."""
    N, D = n, 4 * d
    tensors = files.draw_gptq(np.random.default_rng(seed), N, D, bits, group, v2=v2)
    config = files.gptq_config(bits, group, **({"checkpoint_format": "gptq_v2"} if v2 else {}))
    weight = load(tmp_path, tensors, config, declare(N, D))["up"]
    expected = files.gptq(tensors, N, D, bits, lambda i: i // (group or D), v2=v2)
    np.testing.assert_array_equal(numbers(weight), expected)
    assert isinstance(weight, QuantizedWeight) == (not group or D % group == 0)


@FIXTURE
@given(st.integers(0, 99), SIZE, SIZE, BITS)
def test_gptq_with_inputs_in_the_order_of_activations(tmp_path: Path, seed: int, n: int, d: int, bits: int) -> None:
    N, D = n, 8 * d
    rng = np.random.default_rng(seed)
    tensors = files.draw_gptq(rng, N, D, bits, 4)
    order = rng.permutation(tensors[f"{MODULE}.g_idx"])
    config = files.gptq_config(bits, 4, desc_act=True, checkpoint_format="gptq_v2")
    weight = load(tmp_path, tensors | {f"{MODULE}.g_idx": order}, config, declare(N, D))["up"]
    expected = files.gptq(tensors, N, D, bits, lambda i: int(order[i]), v2=True)
    np.testing.assert_array_equal(numbers(weight), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_zero_points_of_the_first_version_borrow_across_codes(tmp_path: Path, bits: int) -> None:
    """Its writers subtract one from every code of a word at once: a zero point of 0 takes from its neighbour."""
    N, D = 16, 8
    tensors = files.draw_gptq(np.random.default_rng(0), N, D, bits, None)
    tensors[f"{MODULE}.qzeros"] = np.zeros_like(tensors[f"{MODULE}.qzeros"])
    expected = files.gptq(tensors, N, D, bits, lambda i: 0, v2=True)
    tensors[f"{MODULE}.qzeros"] -= np.int32(0x11111111 if bits == 4 else 0x01010101)
    weight = load(tmp_path, tensors, files.gptq_config(bits, None), declare(N, D))["up"]
    np.testing.assert_array_equal(numbers(weight), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("stored_as_v2", [False, True])
def test_symmetric_gptq_has_its_zero_in_the_middle_however_it_is_labelled(
    tmp_path: Path, bits: int, v2: bool, stored_as_v2: bool
) -> None:
    N, D = 16, 8
    tensors = files.draw_gptq(np.random.default_rng(0), N, D, bits, None)
    middle = np.uint32(0x88888888 if bits == 4 else 0x80808080)
    tensors[f"{MODULE}.qzeros"] = np.full((1, N * bits // 32), middle).view(np.int32)
    expected = files.gptq(tensors, N, D, bits, lambda i: 0, v2=True)
    if not stored_as_v2:
        tensors[f"{MODULE}.qzeros"] -= np.int32(0x11111111 if bits == 4 else 0x01010101)
    config = files.gptq_config(bits, None, sym=True, checkpoint_format="gptq_v2" if v2 else "gptq")
    weight = load(tmp_path, tensors, config, declare(N, D))["up"]
    np.testing.assert_array_equal(numbers(weight), expected)
    assert weight.mins is None


@pytest.mark.parametrize("unordered", [None, 0])
def test_gptq_without_an_order_of_inputs(tmp_path: Path, unordered: int | None) -> None:
    N, D = 8, 16
    tensors = files.draw_gptq(np.random.default_rng(0), N, D, 4, 4)
    expected = files.gptq(tensors, N, D, 4, lambda i: i // 4, v2=True)
    order = tensors.pop(f"{MODULE}.g_idx")
    if unordered is not None:
        tensors[f"{MODULE}.g_idx"] = np.full_like(order, unordered)
    weight = load(tmp_path, tensors, files.gptq_config(4, 4, checkpoint_format="gptq_v2"), declare(N, D))["up"]
    np.testing.assert_array_equal(numbers(weight), expected)
    assert isinstance(weight, QuantizedWeight)


@FIXTURE
@given(st.integers(0, 99), st.integers(1, 5), SIZE, st.sampled_from([2, 4]))
def test_awq(tmp_path: Path, seed: int, n: int, d: int, group: int) -> None:
    N, D = 8 * n, group * d
    tensors = files.draw_awq(np.random.default_rng(seed), N, D, group)
    weight = load(tmp_path, tensors, files.awq_config(group), declare(N, D))["up"]
    np.testing.assert_array_equal(numbers(weight), files.awq(tensors, N, D, group))
    assert isinstance(weight, QuantizedWeight)


@FIXTURE
@given(st.integers(0, 99), SIZE, SIZE, BITS, st.sampled_from([None, 2, 8]), st.booleans(), st.booleans())
def test_packed_integers(
    tmp_path: Path, seed: int, n: int, d: int, bits: int, group: int | None, symmetric: bool, ordered: bool
) -> None:
    N, D = n, d * (group or 1)
    rng = np.random.default_rng(seed)
    tensors = files.draw_packed(rng, N, D, bits, group, symmetric=symmetric)
    order = np.arange(D, dtype=np.int32) // (group or D)
    if ordered:
        order = rng.permutation(order)
        tensors[f"{MODULE}.weight_g_idx"] = order
    args = {"num_bits": bits, "symmetric": symmetric}
    args |= {"strategy": "group", "group_size": group, "actorder": "group" if ordered else None} if group else {}
    weight = load(tmp_path, tensors, files.compressed_config(**args), declare(N, D))["up"]
    expected = files.packed(tensors, N, D, bits, lambda i: int(order[i]), symmetric=symmetric)
    np.testing.assert_array_equal(numbers(weight), expected)


def test_packed_integers_with_one_signed_zero_point_per_byte(tmp_path: Path) -> None:
    """As early versions of compressed-tensors write them; and -1 for inputs that were not ordered."""
    N, D = 6, 16
    rng = np.random.default_rng(0)
    tensors = files.draw_packed(rng, N, D, 4, 8, symmetric=True)
    zeros = rng.integers(-8, 8, (N, 2)).astype(np.int8)
    unsigned = files.packed(tensors, N, D, 4, lambda i: i // 8, symmetric=True)
    expected = unsigned - np.repeat(zeros * tensors[f"{MODULE}.weight_scale"].astype(np.float64), 8, axis=1)
    tensors |= {f"{MODULE}.weight_zero_point": zeros, f"{MODULE}.weight_g_idx": np.full(D, -1, np.int32)}
    config = files.compressed_config(symmetric=False, strategy="group", group_size=8)
    np.testing.assert_array_equal(numbers(load(tmp_path, tensors, config, declare(N, D))["up"]), expected)


@FIXTURE
@given(st.integers(0, 99), SIZE, SIZE, st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_blocks_of_integers(
    tmp_path: Path, seed: int, N: int, D: int, rows: int, columns: int, asymmetric: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (-(-N // rows), -(-D // columns))
    codes, zeros = rng.integers(-128, 128, (N, D)).astype(np.int8), rng.integers(-128, 128, shape).astype(np.int8)
    tensors = {NAME: codes, f"{MODULE}.weight_scale": files.scales(rng, *shape, dtype=ml_dtypes.bfloat16)}
    if asymmetric:
        tensors[f"{MODULE}.weight_zero_point"] = zeros
    config = files.compressed_config(
        "int-quantized", num_bits=8, strategy="block", block_structure=[rows, columns], symmetric=not asymmetric
    )
    weight = load(tmp_path, tensors, config, declare(N, D))["up"]

    def formula(n: int, d: int) -> float:
        at = n // rows, d // columns
        return float(tensors[f"{MODULE}.weight_scale"][at]) * (int(codes[n, d]) - (int(zeros[at]) if asymmetric else 0))

    np.testing.assert_array_equal(numbers(weight), files.each(N, D, formula))


@FIXTURE
@given(st.integers(0, 99), SIZE, SIZE, st.integers(1, 9), st.integers(1, 9))
def test_blocks_of_fp8(tmp_path: Path, seed: int, N: int, D: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    codes = (rng.standard_normal((N, D)) * 100).astype(ml_dtypes.float8_e4m3fn)
    scales = files.scales(rng, -(-N // rows), -(-D // columns), dtype=np.float32)
    config = {"quant_method": "fp8", "weight_block_size": [rows, columns], "activation_scheme": "dynamic"}
    tensors = {NAME: codes, f"{MODULE}.weight_scale_inv": scales}
    weight = load(tmp_path, tensors, config, declare(N, D))["up"]
    expected = files.each(N, D, lambda n, d: np.float32(codes[n, d]) * scales[n // rows, d // columns])
    np.testing.assert_array_equal(numbers(weight), expected)


def test_powers_of_two_in_bytes(tmp_path: Path) -> None:
    codes = np.ones((2, 4), ml_dtypes.float8_e4m3fn)
    config = {"quant_method": "fp8", "weight_block_size": [1, 2], "scale_fmt": "ue8m0"}
    tensors = {NAME: codes, f"{MODULE}.weight_scale_inv": np.array([[127, 128], [126, 130]], np.uint8)}
    weight = load(tmp_path, tensors, config, declare(2, 4))["up"]
    np.testing.assert_array_equal(numbers(weight), [[1, 1, 2, 2], [0.5, 0.5, 8, 8]])
