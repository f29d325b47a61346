"""The loop learns, reports every step, and keeps to its schedule."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tenfold.data.packing import Rows
from tenfold.models.family import resolve
from tenfold.train.plot import plot_loss
from tenfold.train.trainer import TrainConfig, schedule, train


@pytest.fixture(autouse=True)
def mixed_dtypes() -> Iterator[None]:
    """optax's schedules multiply floats with integer step counts, which the suite's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def counting(weight: float = 1.0) -> Iterator[Rows]:
    """Rows that count upwards modulo 16: each token follows from the one before."""
    rng = np.random.default_rng(0)
    while True:
        tokens = (rng.integers(0, 16, (8, 1)) + np.arange(12)) % 16
        at = np.broadcast_to(np.arange(12), tokens.shape)
        yield Rows(tokens, np.ones_like(tokens), at, np.full(tokens.shape, weight, np.float32))


def test_a_rule_is_learnt_and_every_step_is_reported(tmp_path: Path) -> None:
    config = TrainConfig(steps=80, warmup=5, decay=20, learning_rate=0.02, evaluate_every=40)
    evaluated: list[int] = []
    train(
        resolve(CONFIG),
        config,
        counting(),
        tmp_path,
        lambda params: {"recall": 0.5},
        lambda params: evaluated.append(1),
    )
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == list(range(1, 81))
    assert events[0]["loss"] == pytest.approx(np.log(17), rel=0.1)  # nothing known: uniform over the vocabulary
    assert events[-1]["loss"] < 0.1
    assert [event["step"] for event in events if "recall" in event] == [40, 80]
    assert len(evaluated) == 2
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 80
    picture = plot_loss(tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 1; lower the learning rate"):
        train(resolve(CONFIG), TrainConfig(steps=2, warmup=1, decay=1), counting(float("nan")), tmp_path)


def test_the_learning_rate_warms_up_stays_and_decays_to_zero() -> None:
    rate = schedule(TrainConfig(steps=100, warmup=10, decay=30, learning_rate=0.5))
    assert [float(rate(step)) for step in (0, 5, 10, 69)] == pytest.approx([0, 0.25, 0.5, 0.5])
    assert float(rate(85)) == pytest.approx(0.25)
    assert float(rate(100)) == pytest.approx(0)
