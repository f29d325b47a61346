"""Quantised checkpoints that ask for what is not implemented, that do not match, or that are damaged."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold.base.errors import CheckpointError, UnsupportedModelError
from tenfold.nn import checkpoint
from tenfold.nn.param import param
from tenfold.nn.quantized_checkpoint import read_format
from tests.nn import quantized_files as files
from tests.nn.quantized_files import (
    CASES,
    MODULE,
    D,
    N,
    Tensors,
    awq_config,
    compressed_config,
    declare,
    gptq_config,
    load,
)

FP8 = CASES["fp8"][1]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Tensors, dict[str, Any]]:
    return CASES[request.param]


# --- what is refused ------------------------------------------------------------------------------------------------


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return config | changes


def group(**changes: Any) -> dict[str, Any]:
    config = compressed_config()
    config["config_groups"]["group_0"] |= changes
    return config


REFUSED: dict[str, tuple[Any, str]] = {
    "method": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
    "no method": ({"bits": 4}, "quant_method=None"),
    "strange method": ({"quant_method": ["gptq"]}, "quant_method="),
    "not an object": ("gptq", "is 'gptq', not an object"),
    "marlin-24": (compressed_config("marlin-24"), "format='marlin-24' for int weights"),
    "nvfp4": (compressed_config("nvfp4-pack-quantized", type="float"), "format='nvfp4-pack-quantized' for float"),
    "no format": (compressed_config(None), "format=None"),
    "asymmetric floats": (
        compressed_config("float-quantized", type="float", num_bits=8, symmetric=False),
        "asymmetric",
    ),
    "packed floats": (compressed_config(type="float"), "format='pack-quantized' for float"),
    "3 bits": (compressed_config(num_bits=3), "weights.num_bits=3"),
    "true bits": (compressed_config("int-quantized", num_bits=True), "weights.num_bits=True"),
    "unfinished": (changed(compressed_config(), quantization_status="frozen"), "quantization_status='frozen'"),
    "sparse": (changed(compressed_config(), sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "rotated": (changed(compressed_config(), transform_config={"config_groups": {"R1": {}}}), "transform_config"),
    "pruned": (changed(compressed_config(), moe_sparsity_config={"method": "prune"}), "moe_sparsity_config"),
    "local": (compressed_config(dynamic="local"), "weights.dynamic='local'"),
    "strategy": (compressed_config(strategy="tensor_group"), "weights.strategy='tensor_group'"),
    "no group size": (compressed_config(strategy="group"), "group_size=None"),
    "group size 0": (compressed_config(strategy="group", group_size=0), "group_size=0"),
    "blocks": (compressed_config("int-quantized", num_bits=8, strategy="block", block_structure=[0, 8]), r"\[0, 8\]"),
    "unknown argument": (compressed_config(rotation="hadamard"), "group_0.rotation, which is not known"),
    "unknown in a group": (group(lora={}), "group_0.lora, which is not known"),
    "preset": (changed(compressed_config(), config_groups={"W4A16": ["Linear"]}), "W4A16"),
    "targets": (group(targets="Linear"), "targets='Linear'"),
    "pattern": (group(targets=["re:("]), "not a regular expression"),
    "ignore": (compressed_config(ignore=["re:*"]), "not a regular expression"),
    "gptq 3 bits": (gptq_config(3, 8), "bits=3"),
    "gptq no bits": ({"quant_method": "gptq"}, "bits=None"),
    "gptq marlin": (gptq_config(4, 8, checkpoint_format="marlin"), "checkpoint_format='marlin'"),
    "gptq old marlin": (gptq_config(4, 8, is_marlin_format=True), "is_marlin_format=True"),
    "gptq words": (gptq_config(4, 8, pack_dtype="int16"), "pack_dtype='int16'"),
    "gptq rotated": (gptq_config(4, 8, rotation="hadamard"), "rotation='hadamard'"),
    "gptq adapter": (gptq_config(4, 8, adapter={"name": "lora"}), "adapter="),
    "gptq rule": (gptq_config(4, 8, dynamic={"+:.*": {"bits": 2}}), "dynamic.bits=2"),
    "gptq rule's value": (gptq_config(4, 8, dynamic={".*": 3}), "dynamic"),
    "gptq group": (gptq_config(4, 8) | {"group_size": "128"}, "group_size='128'"),
    "awq gemv": (awq_config(8, version="GEMV"), "version='gemv'"),
    "awq llm-awq": (awq_config(8, backend="llm-awq"), "backend='llm-awq'"),
    "awq symmetric": (awq_config(8, zero_point=False), "zero_point=False"),
    "awq 8 bits": (awq_config(8) | {"bits": 8}, "bits=8"),
    "awq list": (awq_config(8, modules_to_not_convert="lm_head"), "modules_to_not_convert='lm_head'"),
    "fp8 e5m2": (FP8 | {"fmt": "e5m2"}, "fmt='e5m2'"),
    "fp8 blocks": (FP8 | {"weight_block_size": [128]}, "weight_block_size"),
    "fp8 embeddings": (FP8 | {"modules_to_convert": ["embed"]}, "modules_to_convert"),
    "fp8 experts": (FP8 | {"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
    "fp8 on load": (FP8 | {"is_checkpoint_fp8_serialized": False}, "is_checkpoint_fp8_serialized"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config, message = REFUSED[name]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    for read in (checkpoint.read_config, lambda path: checkpoint.load(path, declare(N, D), "float32")):
        with pytest.raises(UnsupportedModelError, match=message):
            read(tmp_path)


def test_the_first_name_of_the_key_is_known(tmp_path: Path) -> None:
    config = {"compression_config": {"quant_method": "sparseml"}, "quantization_config": None}
    with pytest.raises(UnsupportedModelError, match="sparseml"):
        read_format(config)


# --- what does not match --------------------------------------------------------------------------------------------


def test_a_missing_tensor_of_a_weight_is_named(tmp_path: Path, case: tuple[Tensors, dict[str, Any]]) -> None:
    for name in case[0]:
        if name.endswith(("g_idx", "weight_shape")):
            continue
        with pytest.raises(CheckpointError, match=rf"1 missing: {name}$"):
            load(tmp_path, {k: v for k, v in case[0].items() if k != name}, case[1], declare(N, D))


def test_a_tensor_of_the_wrong_shape_or_dtype_is_named(tmp_path: Path, case: tuple[Tensors, dict[str, Any]]) -> None:
    for name, tensor in case[0].items():
        with pytest.raises(CheckpointError, match=rf"{name} \(in model\.safetensors\) has the shape \["):
            load(tmp_path, case[0] | {name: tensor[:-1]}, case[1], declare(N, D))
        with pytest.raises(CheckpointError, match=rf"{name} \(in model\.safetensors\) is bool, not "):
            load(tmp_path, case[0] | {name: tensor.astype(bool)}, case[1], declare(N, D))


WRONG: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "group out of range": ("gptq", lambda t: {f"{MODULE}.g_idx": np.full(D, 4, np.int32)}, r"\.g_idx puts inputs into"),
    "group below zero": (
        "gptq",
        lambda t: {f"{MODULE}.g_idx": np.full(D, -2, np.int32)},
        "groups -2 to -2; there are 4",
    ),
    "a bias that the model lacks": (
        "gptq",
        lambda t: {f"{MODULE}.bias": np.ones(N, np.float32)},
        "bias .* is not zero",
    ),
    "another shape": (
        "packed",
        lambda t: {f"{MODULE}.weight_shape": np.array([N, D - 1])},
        r"weight_shape says \[16, 31\]",
    ),
    "zero points of a symmetric weight": (
        "integers",
        lambda t: {f"{MODULE}.weight_zero_point": np.ones((N, 1), np.int8)},
        "weight_zero_point .* is not zero everywhere",
    ),
    "zero points of no kind": (
        "packed",
        lambda t: {f"{MODULE}.weight_zero_point": np.ones((N, D // 8), np.int32)},
        r"weight_zero_point cannot be int32 of shape \[16, 4\]; the checkpoint is damaged",
    ),
    "scales of activations that the format has not": (
        "awq",
        lambda t: {f"{MODULE}.input_scale": np.ones(1, np.float32)},
        "1 unexpected: .*input_scale",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_tensor_may_not_hold_is_named(tmp_path: Path, name: str) -> None:
    format_name, change, message = WRONG[name]
    tensors, config = CASES[format_name]
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, tensors | change(tensors), config, declare(N, D))


def test_biases_of_zero_that_old_writers_add_are_left_alone(tmp_path: Path) -> None:
    tensors, config = CASES["gptq"]
    load(tmp_path, tensors | {f"{MODULE}.bias": np.zeros(N, np.float16)}, config, declare(N, D))
    tree = declare(N, D) | {"bias": param((N,), "mlp", f"{MODULE}.bias")}
    bias = np.arange(N, dtype=np.float16)
    np.testing.assert_array_equal(load(tmp_path, tensors | {f"{MODULE}.bias": bias}, config, tree)["bias"], bias)


def test_zero_points_of_zero_of_a_symmetric_weight_are_left_alone(tmp_path: Path) -> None:
    tensors, config = CASES["integers"]
    zeros = {f"{MODULE}.weight_zero_point": np.zeros((N, 1), np.int8)}
    assert load(tmp_path, tensors | zeros, config, declare(N, D))["up"].mins is None


# --- fuzzing --------------------------------------------------------------------------------------------------------

DTYPES = [np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64, ml_dtypes.bfloat16,
          ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu]  # fmt: skip
CHANGES = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.sampled_from(["drop", "dtype", "shape", "values", "flat"]),
        st.sampled_from(DTYPES),
        st.integers(0, 9),
    ),
    max_size=3,
)
VALUES = st.sampled_from(
    [None, 0, -1, 1, 3, 7, 64, 2**40, 0.5, True, "", "x", "8x8", [], [0], [2, 3], {}, {"a": 1}, ["re:("]]
)


@given(st.sampled_from(sorted(CASES)), CHANGES, st.integers(0, 2**32 - 1), st.floats(0, 1) | st.none())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_damaged_tensors_load_or_are_named(
    tmp_path: Path, name: str, changes: list, seed: int, cut: float | None
) -> None:
    tensors, config = dict(CASES[name][0]), CASES[name][1]
    rng = np.random.default_rng(seed)
    for which, change, dtype, size in changes:
        key = sorted(tensors)[which % len(tensors)]
        tensor = tensors[key]
        if change == "drop" and len(tensors) > 1:
            del tensors[key]
        elif change == "dtype":
            tensors[key] = np.zeros(tensor.shape, dtype)
        elif change == "shape":
            tensors[key] = np.resize(tensor, (*tensor.shape[:-1], size))
        elif change == "flat":
            tensors[key] = tensor.reshape(-1)[:size]
        else:
            tensors[key] = np.frombuffer(rng.bytes(tensor.nbytes), tensor.dtype).reshape(tensor.shape)
    files.write(tmp_path, tensors, config)
    if cut is not None:
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[: int(cut * len(data))])
    try:
        with np.errstate(over="ignore"):  # of plain float64 weights
            weight = checkpoint.load(tmp_path, declare(N, D), "float32")["up"]
    except CheckpointError as error:
        assert str(tmp_path) in str(error) or MODULE in str(error)
    else:
        assert files.numbers(weight).shape == (N, D)


@given(st.sampled_from(sorted(CASES)), st.lists(st.tuples(st.integers(0, 30), VALUES), max_size=3), st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
def test_damaged_configs_load_or_are_refused(tmp_path: Path, name: str, changes: list, data: st.DataObject) -> None:
    tensors, config = CASES[name]
    config = json.loads(json.dumps(config))
    for which, value in changes:
        places = [config]
        for place in places:
            places += [inner for inner in place.values() if isinstance(inner, dict)]
        place = places[which % len(places)]
        place[data.draw(st.sampled_from([*sorted(place), "modules_to_not_convert", "dynamic"]))] = copy.deepcopy(value)
    files.write(tmp_path, tensors, {"quantization_config": config})
    try:
        weight = checkpoint.load(tmp_path, declare(N, D), "float32")["up"]
    except CheckpointError as error:
        assert MODULE in str(error)
    except UnsupportedModelError as error:
        assert "quantization_config" in str(error)
    else:
        assert files.numbers(weight).shape == (N, D)
