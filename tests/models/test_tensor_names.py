"""Checkpoints whose tensors are named otherwise, or that hold more than the model: the same weights are loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tenfold.base.errors import CheckpointError
from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tests.parity import golden

Tensors = dict[str, np.ndarray]


def load(path: Path, config: dict[str, Any]) -> Any:
    model = resolve(config)
    return checkpoint.load(path, model.params(), jnp.float32, skipped=model.skipped())


def renamed(tensors: Tensors, prefix: str, other: str) -> Tensors:
    return {other + name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def within(tensors: Tensors) -> Tensors:
    """As transformers 5 names a text model beside others."""
    return {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: tensor
        for name, tensor in tensors.items()
    }


def extra(*names: str) -> Tensors:
    return {name: np.ones((2, 3), np.float32) for name in names}


MULTIMODAL = ("vision_tower.patch.weight", "multi_modal_projector.norm.weight")
GEMMA3N = tuple(
    f"model.{part}.weight" for part in ("vision_tower.stem", "audio_tower.stem", "embed_vision", "embed_audio.x")
)
# what the golden file's checkpoint is called elsewhere, and which architecture says so
CASES: dict[str, tuple[str, str | None, Callable[[Tensors], Tensors]]] = {
    "gpt2 without its prefix, with masks": (
        "gpt2-tied-v4",
        None,
        lambda tensors: renamed(tensors, "transformer.", "") | extra("h.0.attn.bias", "h.2.attn.masked_bias"),
    ),
    "gemma 3 of transformers 4, with a vision tower": (
        "gemma3-layer-types",
        "Gemma3ForConditionalGeneration",
        lambda tensors: {f"language_model.{name}": t for name, t in tensors.items()} | extra(*MULTIMODAL),
    ),
    "gemma 3 of transformers 5, with a vision tower": (
        "gemma3-v4",
        "Gemma3ForConditionalGeneration",
        lambda tensors: within(tensors) | extra(*(f"model.{m}" for m in MULTIMODAL)),
    ),
    "gemma 3n, with towers and keys that nothing reads": (
        "gemma3n",
        "Gemma3nForConditionalGeneration",
        lambda tensors: (
            within(tensors)
            | extra(
                *GEMMA3N,
                *(f"model.language_model.layers.4.self_attn.{k}.weight" for k in ("k_proj", "v_proj", "k_norm")),
            )
        ),
    ),
    "gemma 4, with towers": (
        "gemma4",
        "Gemma4ForConditionalGeneration",
        lambda tensors: within(tensors) | extra(*GEMMA3N),
    ),
    "ministral 3, with a vision tower": (
        "ministral3",
        "Mistral3ForConditionalGeneration",
        lambda tensors: {f"language_model.{name}": t for name, t in tensors.items()} | extra(*MULTIMODAL),
    ),
    "mistral small 3, of transformers 5": (
        "mistral",
        "Mistral3ForConditionalGeneration",
        lambda tensors: within(tensors) | extra(*(f"model.{m}" for m in MULTIMODAL)),
    ),
    "llama 4, with a vision tower": (
        "llama4",
        "Llama4ForConditionalGeneration",
        lambda tensors: (
            {f"language_model.{name}": t for name, t in tensors.items()}
            | extra("vision_model.patch.weight", MULTIMODAL[1])
        ),
    ),
    "qwen 3.5, with a vision tower and a layer that predicts further": (
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        lambda tensors: within(tensors) | extra("model.visual.patch.weight", "mtp.norm.weight"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_names_give_the_same_weights(case: str, tmp_path: Path) -> None:
    name, architecture, change = CASES[case]
    wanted = golden.read(golden.DIRECTORY / f"{name}.json")
    golden.save_checkpoint(wanted, tmp_path)
    expected = load(tmp_path, wanted.config)
    config = {"architectures": [architecture], "text_config": wanted.config} if architecture else wanted.config
    tensors = change(load_file(tmp_path / "model.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path, config), expected)
    save_file(tensors | extra("speech_tower.weight"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 unexpected: speech_tower\.weight"):
        load(tmp_path, config)


def test_experts_in_one_tensor_beside_a_vision_tower(tmp_path: Path) -> None:
    """Qwen 3.5's text alone is written expert by expert, and beside a tower all experts together."""
    wanted = golden.read(golden.DIRECTORY / "qwen3_5_moe.json")
    golden.save_checkpoint(wanted, tmp_path)
    alone = load(tmp_path, wanted.config)
    tensors = load_file(tmp_path / "model.safetensors")
    for i in range(wanted.config["num_hidden_layers"]):
        at = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            np.stack([tensors.pop(f"{at}.{e}.{part}_proj.weight") for e in range(wanted.config["num_experts"])])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{at}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{at}.down_proj": down}
    save_file(within(tensors) | extra("model.visual.patch.weight"), tmp_path / "model.safetensors")
    config = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "text_config": wanted.config}
    whole = load(tmp_path, config)
    for layer in whole["layers"]:
        layer["gate"], layer["up"] = layer["gate_up"][:, :, 0], layer.pop("gate_up")[:, :, 1]
    jax.tree.map(np.testing.assert_array_equal, whole, alone)
