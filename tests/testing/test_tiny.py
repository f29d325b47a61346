"""The tiny checkpoint, read by independent readers of its formats."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from tenfold.testing.tiny import write_tiny_checkpoint


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(path, layers=3, width=32, heads=4, kv_heads=2, max_len=96)
    return path


def test_tensors_have_llamas_names_and_shapes(directory):
    tensors = load_file(directory / "model.safetensors")
    layer = {
        "input_layernorm.weight": (32,),
        "self_attn.q_proj.weight": (32, 32),
        "self_attn.k_proj.weight": (16, 32),
        "self_attn.v_proj.weight": (16, 32),
        "self_attn.o_proj.weight": (32, 32),
        "post_attention_layernorm.weight": (32,),
        "mlp.gate_proj.weight": (64, 32),
        "mlp.up_proj.weight": (64, 32),
        "mlp.down_proj.weight": (32, 64),
    }
    expected = {f"model.layers.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": (262, 32), "model.norm.weight": (32,), "lm_head.weight": (262, 32)}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    assert 0.14 < tensors["lm_head.weight"].std() < 0.16


def test_configuration_names_the_end_tokens(directory):
    config = json.loads((directory / "config.json").read_text())
    assert (config["max_position_embeddings"], config["num_hidden_layers"]) == (96, 3)
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [257, 258]


def test_seed_decides_the_weights(tmp_path):
    weights = []
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        write_tiny_checkpoint(tmp_path / name, layers=1, width=16, heads=2, kv_heads=1, seed=seed)
        weights.append(load_file(tmp_path / name / "model.safetensors")["lm_head.weight"])
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])
