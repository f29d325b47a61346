"""Quantised checkpoints as a whole: which weights are stored how, what is refused, and what does not match."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.base.affine import Affine
from tenfold.base.errors import CheckpointError
from tenfold.kernels.matmul import QuantizedWeight
from tenfold.models.family import Model, resolve
from tenfold.nn import checkpoint, quantization, safetensors
from tenfold.nn import param as params
from tenfold.nn.attention import attention_params
from tenfold.nn.embedding import embedding_params
from tenfold.nn.layout import to_checkpoint
from tenfold.nn.mlp import mlp_params
from tenfold.nn.packed import packed_attend
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.quantization import SCHEMES, quantize_param
from tenfold.nn.quantized_checkpoint import read_format
from tenfold.parallel.sharding import make_mesh
from tests.nn import quantized_files as files
from tests.nn.quantized_files import (
    CASES,
    MODULE,
    NAME,
    D,
    N,
    Tensors,
    awq_config,
    compressed_config,
    declare,
    gptq_config,
    load,
)

GOLDEN = Path(__file__).parent / "golden"
RNG = np.random.default_rng(0)
FP8 = CASES["fp8"][1]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Tensors, dict[str, Any]]:
    return CASES[request.param]


# --- loading --------------------------------------------------------------------------------------------------------


def test_parts_of_a_fused_tensor_are_its_rows(tmp_path: Path, case: tuple[Tensors, dict[str, Any]]) -> None:
    whole = files.numbers(load(tmp_path, *case, declare(N, D))["up"])
    parts = [
        param((D, 2, 3), "embed heads head_dim", NAME, "(H K) D -> D H K", rows=(0, 6), inputs="embed"),
        param((D, 9), "embed mlp", NAME, "F D -> D F", rows=(6, 15), inputs="embed"),
        param((D, 1), "embed mlp", NAME, "F D -> D F", rows=(15, 16)),
    ]
    loaded = checkpoint.load(tmp_path, parts, "float32")
    np.testing.assert_array_equal(np.concatenate([files.numbers(w).reshape(-1, D) for w in loaded[1:]]), whole[6:])
    first = loaded[0]
    if isinstance(first, QuantizedWeight):
        assert first.dims == (2, 3)
        np.testing.assert_array_equal(files.numbers(first), whole[:6])
    else:
        np.testing.assert_array_equal(np.moveaxis(first, 0, 2).reshape(6, D), whole[:6])


def test_the_weights_outlive_the_file(tmp_path: Path, case: tuple[Tensors, dict[str, Any]]) -> None:
    weight = load(tmp_path, *case, declare(N, D))["up"]
    before = files.numbers(weight)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as damaged:
        damaged.write(bytes(file.stat().st_size))
    np.testing.assert_array_equal(files.numbers(weight), before)


def test_sharded_weights_come_as_numbers(tmp_path: Path, case: tuple[Tensors, dict[str, Any]]) -> None:
    tree = declare(N, D)
    whole = files.numbers(load(tmp_path, *case, tree)["up"])
    mesh = make_mesh({"tensor": 4})
    sharded = checkpoint.load(tmp_path, tree, "float32", shardings=params.shardings(tree, mesh))["up"]
    assert isinstance(sharded, jax.Array) and len(sharded.addressable_shards) == 4
    np.testing.assert_allclose(files.numbers(sharded), whole, rtol=1e-6)


def test_finish_sees_what_was_loaded(tmp_path: Path, case: tuple[Tensors, dict[str, Any]]) -> None:
    seen: list[tuple[Param, Any]] = []
    tree = declare(N, D)
    checkpoint.load(files.write(tmp_path, *case), tree, "bfloat16", finish=lambda p, w: seen.append((p, w)))
    ((p, weight),) = seen
    assert p == tree["up"]
    assert isinstance(weight, QuantizedWeight) or weight.dtype == jnp.bfloat16


def test_a_weights_tensors_may_lie_in_several_files(tmp_path: Path) -> None:
    tensors, config = CASES["packed"]
    whole = files.numbers(load(tmp_path, tensors, config, declare(N, D))["up"])
    (tmp_path / "model.safetensors").unlink()
    for i, (name, tensor) in enumerate(tensors.items()):
        safetensors.write(tmp_path / f"model-{i}.safetensors", {name: tensor})
    np.testing.assert_array_equal(files.numbers(checkpoint.load(tmp_path, declare(N, D), "float32")["up"]), whole)


def logits(model: Model, weights: Tree, tokens: np.ndarray) -> jax.Array:
    attend = packed_attend(jnp.zeros((1, len(tokens)), jnp.int32))
    x, _ = model.forward(weights, jnp.asarray(tokens), jnp.arange(len(tokens)), attend)
    return model.logits(weights, x)


def test_a_model_by_compressed_tensors_answers_as_in_transformers(tmp_path: Path) -> None:
    """And as the checkpoint of the numbers that its weights stand for. Some of its weights are not quantised."""
    golden = safetensors.open(GOLDEN / "llama.safetensors")
    stored = {name: tensor for name, tensor in golden.items() if not name.startswith("expected.")}
    tokens, expected = stored.pop("tokens").astype(np.int32), stored.pop("logits")
    config = json.loads(golden.metadata["config"])
    model = resolve(checkpoint.read_config(files.write(tmp_path / "quantised", stored, config)))
    weights = checkpoint.load(tmp_path / "quantised", model.params(), "float32")
    first, second = weights["layers"]
    assert all(isinstance(first[name], QuantizedWeight) for name in ("q", "k", "v", "o", "gate", "up", "down"))
    assert isinstance(second["q"], QuantizedWeight) and isinstance(second["up"], jax.Array)
    ours = logits(model, weights, tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=0)
    plain = {name: tensor for name, tensor in stored.items() if ".weight_" not in name}
    plain |= {name.removeprefix("expected."): tensor for name, tensor in golden.items() if name not in stored}
    safetensors.write(
        tmp_path / "model.safetensors", {name: plain[name] for name in plain.keys() - {"tokens", "logits"}}
    )
    np.testing.assert_allclose(
        ours, logits(model, checkpoint.load(tmp_path, model.params(), "float32"), tokens), atol=1e-4, rtol=0
    )


def test_an_export_of_quantised_weights_is_plain(tmp_path: Path, case: tuple[Tensors, dict[str, Any]]) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": case[1]}
    tree = declare(N, D, inputs="")
    weights = load(tmp_path, case[0], config, tree)
    checkpoint.export(tmp_path / "out", tree, weights, config=config, dtype="float32")
    assert "quantization_config" not in checkpoint.read_config(tmp_path / "out")
    np.testing.assert_array_equal(checkpoint.load(tmp_path / "out", tree, "float32")["up"], weights["up"])


# --- which weights are quantised ------------------------------------------------------------------------------------

PLAIN = {NAME: RNG.standard_normal((N, D)).astype(np.float32)}
FLAT_NORM = {"norm": param((2, 4), "heads head_dim", "model.norm.weight", "(H K) -> H K")}
LISTS: dict[str, dict[str, Any]] = {
    "compressed name": compressed_config(ignore=[MODULE]),
    "compressed pattern": compressed_config(ignore=["re:.*mlp.*_proj$"]),
    "compressed kind": compressed_config(ignore=["Linear"]),
    "compressed target": compressed_config() | {"config_groups": {"g": {"targets": ["re:.*attn.*"], "weights": {}}}},
    "compressed dense": compressed_config("dense"),
    "awq part": awq_config(8, modules_to_not_convert=["mlp"]),
    "awq name": awq_config(8, modules_to_not_convert=["lm_head", MODULE]),
    "awq weight": awq_config(8, modules_to_not_convert=[NAME]),
    "fp8 prefix": FP8 | {"modules_to_not_convert": ["model.layers.0"]},
    "fp8 ignored": FP8 | {"ignored_layers": ["up_proj"]},
    "gptq dynamic": gptq_config(4, 8, dynamic={"-:.*up_proj.*": {}}),
    "mxfp4 pattern": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp"]},
}


@pytest.mark.parametrize("name", LISTS)
def test_weights_in_a_list_are_plain(tmp_path: Path, name: str) -> None:
    np.testing.assert_array_equal(load(tmp_path, PLAIN, LISTS[name], declare(N, D))["up"].T, PLAIN[NAME])
    with pytest.raises(CheckpointError, match=rf"1 missing: {NAME}; 3 unexpected: {MODULE}\.qweight"):
        load(tmp_path, {k: v for k, v in CASES["gptq"][0].items() if "g_idx" not in k}, LISTS[name], declare(N, D))


@pytest.mark.parametrize("entry", ["up", "model.layers.1", "layers.0.mlp.up", "re:up_proj"])
def test_lists_name_whole_parts(tmp_path: Path, entry: str) -> None:
    config = awq_config(8, modules_to_not_convert=[entry])
    assert isinstance(load(tmp_path, CASES["awq"][0], config, declare(N, D))["up"], QuantizedWeight)


def test_a_plain_weight_that_a_list_forgot_is_read(tmp_path: Path, case: tuple[Tensors, dict[str, Any]]) -> None:
    np.testing.assert_array_equal(load(tmp_path, PLAIN, case[1], declare(N, D))["up"].T, PLAIN[NAME])


def test_norms_biases_and_embeddings_are_plain(tmp_path: Path, case: tuple[Tensors, dict[str, Any]]) -> None:
    tree = (
        FLAT_NORM | embedding_params(5, D, tied=True) | {"bias": param((N,), "mlp", f"{MODULE}.bias")} | declare(N, D)
    )
    values = {"model.norm.weight": (8,), "model.embed_tokens.weight": (5, D), f"{MODULE}.bias": (N,)}
    plain = {name: RNG.standard_normal(shape).astype(np.float32) for name, shape in values.items()}
    loaded = load(tmp_path, case[0] | plain, case[1], tree)
    np.testing.assert_array_equal(loaded["norm"].reshape(-1), plain["model.norm.weight"])
    np.testing.assert_array_equal(loaded["embed"], plain["model.embed_tokens.weight"])
    np.testing.assert_array_equal(loaded["bias"], plain[f"{MODULE}.bias"])


@pytest.mark.parametrize(
    ("name", "config"),
    [("awq", awq_config(8)), ("gptq", gptq_config(4, 8, lm_head=True)), ("packed", CASES["packed"][1]), ("fp8", FP8)],
)
def test_the_head_is_quantised_where_the_checkpoint_has_it_so(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    tree = {"head": param((D, N), "embed vocab", "lm_head.weight", "V D -> D V", inputs="embed")}
    tensors = {key.replace(MODULE, "lm_head"): tensor for key, tensor in CASES[name][0].items()}
    expected = files.numbers(load(tmp_path, *CASES[name], declare(N, D))["up"])
    if name == "gptq":
        config |= {"checkpoint_format": "gptq_v2"}
    np.testing.assert_array_equal(files.numbers(load(tmp_path, tensors, config, tree)["head"]), expected)
    plain = {"lm_head.weight": PLAIN[NAME]}
    np.testing.assert_array_equal(load(tmp_path, plain, config, tree)["head"].T, PLAIN[NAME])


def test_the_most_specific_group_of_compressed_tensors_counts(tmp_path: Path) -> None:
    config = compressed_config(num_bits=8)
    eight = config["config_groups"]["group_0"]
    four = eight | {
        "targets": ["re:.*mlp.*"],
        "weights": eight["weights"] | {"num_bits": 4},
        "format": "pack-quantized",
    }
    config |= {"format": "mixed-precision", "config_groups": {"a": eight | {"format": "int-quantized"}, "b": four}}
    tensors = files.draw_packed(np.random.default_rng(0), N, D, 4, None, symmetric=True)
    assert load(tmp_path, tensors, config, declare(N, D))["up"].bits == 4
    config["config_groups"]["b"]["targets"] = ["re:.*attn.*"]
    assert load(tmp_path, CASES["integers"][0], config, declare(N, D))["up"].bits == 8


def test_gptq_rules_for_single_modules(tmp_path: Path) -> None:
    dynamic = {"+:.*up_proj": {"bits": 8, "group_size": -1}, ".*": {"sym": True, "desc_act": True}}
    config = gptq_config(4, 8, checkpoint_format="gptq_v2", dynamic=dynamic)
    expected = files.numbers(load(tmp_path, *CASES["gptq 8 bits"], declare(N, D))["up"])
    loaded = load(tmp_path, CASES["gptq 8 bits"][0], config, declare(N, D))["up"]
    np.testing.assert_array_equal(files.numbers(loaded), expected)


def test_every_weight_for_products_is_its_rows_turned() -> None:
    """What quantised weights rely on: as a matrix, a weight is the transpose of what the checkpoint has."""
    declared: Tree = [attention_params("a", 6, 2, 1, 4), attention_params("b", 6, 2, 1, 4, fused=True)]
    declared += [mlp_params("c", 6, 5), mlp_params("d", 6, 5, fused=True), embedding_params(7, 6, tied=False)]
    declared += [embedding_params(7, 6, tied=True)]
    for _, p in params.leaves(declared):
        if p.inputs:
            values = np.arange(np.prod(p.shape), dtype=np.float32).reshape(p.shape)
            stored = to_checkpoint(values, p.sources[0].layout)
            np.testing.assert_array_equal(p.as_matrix(jnp.asarray(values)), stored.T)


def test_families_know_nothing_of_quantisation() -> None:
    config = json.loads(safetensors.open(GOLDEN / "llama.safetensors").metadata["config"])
    assert resolve(config) == resolve({key: config[key] for key in config if key != "quantization_config"})


# --- what is said about it ------------------------------------------------------------------------------------------


def test_what_is_left_out_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, config = CASES["integers"]
    config = json.loads(json.dumps(config)) | {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int", "dynamic": True}
    scales = {
        f"{MODULE}.input_scale": np.ones(1, np.float32),
        "model.layers.0.self_attn.k_scale": np.ones(1, np.float32),
    }
    with caplog.at_level(logging.INFO, "tenfold"):
        load(tmp_path, tensors | scales, config, declare(N, D))
    assert "the weights are quantised (compressed-tensors)" in caplog.text
    assert "8-bit input activations of group_0, rounded as they come" in caplog.text
    assert "kv_cache_scheme" in caplog.text
    assert f"2 tensors of scales: {MODULE}.input_scale" in caplog.text


def test_weights_that_lose_their_form_are_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors, config = CASES["gptq"]
    order = {f"{MODULE}.g_idx": np.random.default_rng(0).permutation(tensors[f"{MODULE}.g_idx"])}
    load(tmp_path, tensors | order, config | {"desc_act": True}, declare(N, D))
    assert (
        "1 quantised weights have scales whose inputs do not stand together (act-order): loaded as float32"
        in caplog.text
    )


def size(weight: jax.Array | QuantizedWeight) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(weight))


def test_the_bytes_of_a_checkpoint_are_known_before_it_is_loaded(tmp_path: Path, case: tuple) -> None:
    form = read_format({"quantization_config": case[1]})
    tree = declare(N, D)
    assert quantization.nbytes(tree, "bfloat16", form) == size(
        checkpoint.load(files.write(tmp_path, *case), tree, "bfloat16")["up"]
    )
    assert quantization.nbytes(tree, "float32", None, None) == params.nbytes(tree, "float32")


@pytest.mark.parametrize("scheme", SCHEMES.values())
@pytest.mark.parametrize("inputs", [32, 37, 64])
def test_the_bytes_of_weights_to_be_rounded_are_known(scheme: quantization.Scheme, inputs: int) -> None:
    tree = declare(6, inputs) | embedding_params(6, inputs, tied=False)
    rounded = [quantize_param(p, jnp.zeros(p.shape, "bfloat16"), scheme) for _, p in params.leaves(tree)]
    assert quantization.nbytes(tree, "bfloat16", None, scheme) == sum(map(size, rounded))


def test_a_format_in_the_checkpoint_comes_before_rounding() -> None:
    tree, form = declare(N, D), read_format({"quantization_config": CASES["packed"][1]})
    assert quantization.nbytes(tree, "float32", form, SCHEMES["int8"]) == quantization.nbytes(tree, "float32", form)
    fp8 = read_format({"quantization_config": FP8})
    eight = quantization.nbytes(tree, "float32", SCHEMES["int8"])
    assert quantization.nbytes(tree, "float32", fp8, SCHEMES["int8"]) == eight


def test_affine_weights_with_an_odd_number_of_inputs_take_a_byte_each() -> None:
    rows = Affine(codes=np.array([[-8, 7, 1]], np.int8), scales=np.ones((1, 1), np.float32), minima=None, bits=4)
    weight = quantization.from_affine(rows, (1,))
    assert weight.bits == 8
    np.testing.assert_array_equal(files.numbers(weight), [[-8, 7, 1]])
    np.testing.assert_array_equal(rows.values(), [[-8, 7, 1]])
