"""Recipes of fine-tuning, spread over devices or computed again: the losses of one device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenfold.base.errors import ConfigError
from tenfold.nn.lora import LoraConfig
from tenfold.testing.tiny import write_tiny_checkpoint
from tenfold.train.adapters import TuningConfig
from tenfold.train.distill import DistillConfig, distill
from tenfold.train.dpo import DpoConfig, dpo
from tenfold.train.embed import EmbedConfig, embed
from tenfold.train.events import read_events
from tenfold.train.optimizers import OptimizerConfig
from tenfold.train.parallelism import Parallelism
from tenfold.train.pretrain import Dataset
from tenfold.train.sft import SftConfig, sft
from tenfold.train.trainer import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mixed_dtypes")]

LORA = LoraConfig(r=2, use_dora=True)
Recipe = Callable[[TuningConfig, Path, Path], Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    write_tiny_checkpoint(path, layers=2, width=16, heads=2, kv_heads=2, max_len=64)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that each of the recipes takes."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row(i)) + "\n" for i in range(12)))
    return path


def row(i: int) -> dict[str, Any]:
    def chat(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]

    talks = {"messages": chat("yes"), "chosen": chat("yes"), "rejected": chat("no")}
    return talks | {"query": f"q{i}", "positive": f"p{i}"}


def tune(tuning: TuningConfig, data: Path, output: Path) -> Any:
    return sft(SftConfig(tuning=tuning, datasets=(Dataset(where=str(data)),)), output)


def prefer(tuning: TuningConfig, data: Path, output: Path) -> Any:
    return dpo(DpoConfig(tuning=tuning, dataset=Dataset(where=str(data))), output)


def learn(tuning: TuningConfig, data: Path, output: Path) -> Any:
    config = SftConfig(tuning=tuning, datasets=(Dataset(where=str(data)),))
    return distill(DistillConfig(sft=config, teacher=tuning.model), output)


def encode(tuning: TuningConfig, data: Path, output: Path) -> Any:
    return embed(EmbedConfig(tuning=tuning, dataset=Dataset(where=str(data))), output)


def losses(
    recipe: Recipe, base: Path, data: Path, output: Path, lora: LoraConfig | None = None, **parallelism: Any
) -> list[float]:
    optimizer = OptimizerConfig(learning_rate=0.01, schedule="constant", weight_decay=0.0)
    training = TrainConfig(steps=3, plots=False, optimizer=optimizer, parallelism=Parallelism(**parallelism))
    tuning = TuningConfig(model=str(base), lora=lora, max_length=32, batch_size=4, training=training)
    recipe(tuning, data, output)
    return [event["loss"] for event in read_events(output) if "loss" in event]


SPREAD: dict[str, tuple[Recipe, LoraConfig | None, list[dict[str, Any]]]] = {
    "sft": (
        tune,
        None,
        [
            {"remat": "full"},
            {"remat": "dots", "mesh": "fsdp=2,tensor=2"},
            {"mesh": "pipeline=2,tensor=2", "micro_batches": 4, "schedule": "1f1b", "remat": "full"},
            {"mesh": "pipeline=2,fsdp=2", "micro_batches": 2, "offload_optimizer": True},
        ],
    ),
    "sft-lora": (
        tune,
        LORA,
        [{"remat": "offload", "mesh": "fsdp=2,tensor=2"}, {"mesh": "pipeline=2,fsdp=2", "micro_batches": 2}],
    ),
    "dpo": (
        prefer,
        LORA,
        [{"remat": "full", "mesh": "fsdp=2,tensor=2"}, {"mesh": "pipeline=2,fsdp=2", "micro_batches": 2}],
    ),
    "distill": (learn, None, [{"remat": "full", "mesh": "fsdp=2,tensor=2"}]),
    "embed": (encode, None, [{"remat": "full", "mesh": "fsdp=2,tensor=2"}]),
}


@pytest.mark.parametrize("name", SPREAD)
def test_losses_are_those_of_one_device(name: str, base: Path, data: Path, tmp_path: Path) -> None:
    recipe, lora, spreads = SPREAD[name]
    alone = losses(recipe, base, data, tmp_path / "alone", lora)
    assert len(set(alone)) == 3
    for i, parallelism in enumerate(spreads):
        found = losses(recipe, base, data, tmp_path / str(i), lora, **parallelism)
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5, err_msg=str(parallelism))


def test_pipelines_that_a_recipe_cannot_have(base: Path, data: Path, tmp_path: Path) -> None:
    pipeline = {"mesh": "pipeline=2", "micro_batches": 1}
    for recipe, message in ((learn, "runs its teacher whole"), (encode, "see their own passages only")):
        with pytest.raises(ConfigError, match=f"{message}; leave the axis pipeline out of the mesh"):
            losses(recipe, base, data, tmp_path, **pipeline)
    with pytest.raises(ConfigError, match="'' has no pipeline to run by the schedule 'gpipe' in 2 stages"):
        losses(tune, base, data, tmp_path, stages=2)
    assert read_events(tmp_path) == []
