"""The recipe of pretraining: a model that serves comes out, and what cannot work is said before the first step."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.base.errors import ConfigError, DataError
from tenfold.data.tokenizer import Tokenizer
from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tenfold.parallel.layout import NOWHERE
from tenfold.testing.tiny import write_tiny_checkpoint
from tenfold.train.batches import WINDOW
from tenfold.train.events import read_events
from tenfold.train.loss import next_token_loss
from tenfold.train.optimizers import OptimizerConfig
from tenfold.train.parallelism import Parallelism
from tenfold.train.pretrain import Dataset, PretrainConfig, evaluate_model, pretrain
from tenfold.train.trainer import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mixed_dtypes")]

LENGTH = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_tiny_checkpoint(path, layers=1, width=32, max_len=LENGTH)
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "corpus.jsonl"
    lines = [json.dumps({"text": f"one {n} two {n} three {n} " * (1 + n % 4)}) for n in range(50)]
    path.write_text("\n".join(lines))
    return path


def config(model: Path, corpus: Path, **changes: Any) -> PretrainConfig:
    training = TrainConfig(steps=30, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=3), plots=False)
    datasets = (Dataset(where=str(corpus)),)
    made = PretrainConfig(model=str(model), datasets=datasets, max_length=LENGTH, batch_size=4, training=training)
    return replace(made, **changes)


def test_a_model_comes_out_that_knows_the_corpus(model: Path, corpus: Path, tmp_path: Path) -> None:
    held_out = Dataset(where=str(corpus))
    trained = pretrain(config(model, corpus, from_scratch=True, validation=held_out, eval_batches=2), tmp_path)
    assert trained.finished
    (event,) = [event for event in read_events(tmp_path) if "eval_loss" in event]
    assert event["step"] == 30
    assert event["eval_perplexity"] == pytest.approx(math.exp(event["eval_loss"]))
    steps = [event for event in read_events(tmp_path) if "loss" in event]
    assert steps[0]["loss"] == pytest.approx(math.log(262), rel=0.1)
    assert event["eval_loss"] < 0.6 * steps[0]["loss"]
    assert all(step["mfu"] > 0 for step in steps)
    out = tmp_path / "model"
    written = resolve(checkpoint.read_config(out))
    params = checkpoint.load(out, written.params(), jnp.float32)
    for ours, theirs in zip(
        jax.tree.leaves(params["layers"][0]), jax.tree.leaves(trained.state.trainable["layers"]["scan"][0]), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs[0])
    measured = evaluate_model(str(out), held_out, max_length=LENGTH, batch_size=4, eval_batches=2)
    assert measured == pytest.approx({name: event[name] for name in measured}, rel=1e-6)
    assert Tokenizer.load(out).has_chat_template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"]


def test_training_goes_on_from_a_checkpoint_s_weights(model: Path, corpus: Path, tmp_path: Path) -> None:
    from tenfold.train.pretrain import _batches

    one = config(model, corpus, training=TrainConfig(steps=1, plots=False))
    pretrain(one, tmp_path)
    batch = next(_batches(one, one.datasets, Tokenizer.load(model), NOWHERE))
    family = resolve(checkpoint.read_config(model))
    params = checkpoint.load(model, family.params(), jnp.float32)
    wanted = next_token_loss(params, family, batch).mean
    (event,) = [event for event in read_events(tmp_path) if "loss" in event]
    assert event["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_input_never_waits(corpus: Path, tmp_path: Path) -> None:
    """Tokenised while it trains, over more rows than are packed at a time, and of steps of a fraction of a second."""
    write_tiny_checkpoint(tmp_path / "model", layers=4, width=128, max_len=256)
    training = TrainConfig(steps=40, plots=False)
    made = config(tmp_path / "model", corpus, max_length=256, batch_size=8, training=training)
    pretrain(made, tmp_path / "run")
    shares = [event["data_share"] for event in read_events(tmp_path / "run") if "data_share" in event]
    assert WINDOW < 40 * 8
    assert np.mean(shares[1:]) < 0.02  # the first one fills the buffers


def spread(made: PretrainConfig, **parallelism: Any) -> PretrainConfig:
    return replace(made, training=replace(made.training, parallelism=Parallelism(**parallelism)))


def refused(made: PretrainConfig, run_dir: Path, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pretrain(made, run_dir)
    assert read_events(run_dir) == []


def test_what_does_not_fit_is_said_before_the_first_step(model: Path, corpus: Path, tmp_path: Path) -> None:
    good = config(model, corpus)
    refused(replace(good, datasets=()), tmp_path, ConfigError, "name a dataset")
    refused(replace(good, max_length=65), tmp_path, ConfigError, "65 tokens do not fit .* longest context is 64")
    refused(replace(good, text_column="body"), tmp_path, DataError, "no column 'body'; it has text")
    refused(spread(good, mesh="fsdp=3"), tmp_path, ConfigError, "do not divide 4 devices")
    refused(replace(spread(good, mesh="fsdp=4"), batch_size=6), tmp_path, ConfigError, "6 rows of a batch do not div")
    refused(spread(good, mesh="shards=4"), tmp_path, ConfigError, "the axis 'shards'")
    refused(spread(good, schedule="1f1b"), tmp_path, ConfigError, "no pipeline to run by the schedule '1f1b'")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": 3}\n')
    refused(
        replace(good, datasets=(Dataset(where=str(bad)),)), tmp_path, DataError, "bad.jsonl, line 2: 'text' must be"
    )
    empty = tmp_path / "empty.txt"
    empty.touch()
    refused(replace(good, datasets=(Dataset(where=str(empty)),)), tmp_path, DataError, "empty.txt is empty")


def test_a_vocabulary_that_does_not_fit_is_named(model: Path, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        if file.suffix == ".json":
            (other / file.name).write_bytes(file.read_bytes())
    hf = json.loads((other / "config.json").read_text()) | {"vocab_size": 100}
    (other / "config.json").write_text(json.dumps(hf))
    message = "the tokenizer has 262 tokens and the model's vocabulary 100"
    refused(config(other, corpus, from_scratch=True), tmp_path / "run", ConfigError, message)
