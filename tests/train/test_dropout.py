"""Dropout of adapters: as PEFT has it, the same in every step that is done again, and none in evaluations."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.base.errors import ConfigError
from tenfold.kernels.matmul import AdaptedWeight, matmul
from tenfold.nn.lora import LoraConfig, adapter_params, dropout_keys
from tenfold.nn.param import Param, param, stack
from tenfold.testing.tiny import write_tiny_checkpoint
from tenfold.train.adapters import Frozen, TuningConfig, adapted_loss
from tenfold.train.checkpoints import CheckpointConfig
from tenfold.train.dpo import DpoConfig
from tenfold.train.dropout import Seeded, SeededBatches
from tenfold.train.embed import EmbedConfig
from tenfold.train.events import read_events
from tenfold.train.loss import LossSum
from tenfold.train.optimizers import OptimizerConfig
from tenfold.train.parallelism import Parallelism
from tenfold.train.pretrain import Dataset
from tenfold.train.sft import SftConfig, sft
from tenfold.train.trainer import TrainConfig
from tests.train.runs import make_batches

M, D, N, R = 8, 6, 5, 2
SHARE = 0.25
W = param((D, N), "embed mlp", "w.weight", "N D -> D N", inputs="embed")


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def adapted(key: jax.Array | None, *, dora: bool) -> AdaptedWeight:
    magnitude = jnp.abs(draw(N)) if dora else None
    return AdaptedWeight(
        base=draw(D, N), a=draw(D, R), b=draw(R, N), magnitude=magnitude, scale=1.5, dropout=SHARE, key=key
    )


@pytest.mark.parametrize("dora", [False, True])
def test_products_are_those_of_peft(dora: bool) -> None:
    """y = W x + s · B A d(x), and for DoRA, with f = m / |W + s · B A|, W x + (f - 1) · W d(x) + f · s · B A d(x)."""
    key, x = jax.random.key(3), draw(M, D)
    (found,) = matmul(x, adapted(key, dora=dora))
    kept = np.asarray(jax.random.bernoulli(key, 1 - SHARE, x.shape))
    assert 0.5 < kept.mean() < 1
    w, a, b, whole = (np.asarray(array, np.float64) for array in (draw(D, N), draw(D, R), draw(R, N), x))
    seen = whole * kept / (1 - SHARE)
    added = 1.5 * seen @ a @ b
    wanted = whole @ w + added
    if dora:
        factor = np.abs(np.asarray(draw(N), np.float64)) / np.linalg.norm(w + 1.5 * a @ b, axis=0)
        wanted = whole @ w + (factor - 1) * (seen @ w) + factor * added
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_dropped_is_made_up_for_on_average(dora: bool) -> None:
    x, keys = draw(M, D), jax.random.split(jax.random.key(0), 4000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: matmul(x, adapted(key, dora=dora))[0]))(keys))
    (wanted,) = matmul(x, adapted(None, dora=dora))
    error = drawn.std(0) / np.sqrt(len(keys))
    assert float(error.max()) > 0
    assert (np.abs(drawn.mean(0) - wanted) < 5 * error + 1e-5).all()


def test_every_layer_and_every_adapter_draws_anew() -> None:
    declared = adapter_params({"one": {"w": W}, "all": [{"w": stack([W, W, W])}]}, LoraConfig(r=R))
    keys = dropout_keys(declared, jax.random.key(0))
    assert keys["all"][0]["w"].shape == (3,)
    data = [np.asarray(jax.random.key_data(key)).reshape(-1, 2) for key in jax.tree.leaves(keys)]
    assert len(np.unique(np.concatenate(data), axis=0)) == 4


def test_losses_drop_by_the_seeds_of_a_batch_and_without_them_nothing() -> None:
    def loss(weights: Any, frozen: Any, batch: jax.Array) -> LossSum:
        (y,) = matmul(batch, weights["w"])
        return LossSum(jnp.square(y).sum(), jnp.float32(len(y)), {})

    tree, x = {"w": W}, draw(M, D)
    declared = adapter_params(tree, LoraConfig(r=R))
    trainable = jax.tree.map(lambda p: draw(*p.shape), declared, is_leaf=lambda p: isinstance(p, Param))
    frozen = Frozen({"w": draw(D, N)}, {})
    dropping, plain = (jax.jit(adapted_loss(loss, LoraConfig(r=R, lora_dropout=p), declared)) for p in (0.5, 0.0))
    seeds = np.arange(M, dtype=np.uint32)
    first, again, other = (
        float(dropping(trainable, frozen, Seeded(x, given)).total) for given in (seeds, seeds, seeds + 1)
    )
    whole = float(plain(trainable, frozen, x).total)
    assert first == again
    assert len({first, other, whole}) == 3
    assert float(dropping(trainable, frozen, x).total) == whole  # as in an evaluation


def test_seeds_follow_from_where_batches_stand() -> None:
    batches = SeededBatches(make_batches(), seed=1)
    first = [next(batches) for _ in range(2)]
    state = json.loads(json.dumps(batches.get_state()))
    wanted = [next(batches) for _ in range(3)]
    restored = SeededBatches(make_batches(), seed=1)
    restored.set_state(state)
    for batch in wanted:
        jax.tree.map(np.testing.assert_array_equal, next(restored), batch)
    elsewhere = SeededBatches(make_batches(), seed=1, share=1)
    drawn = [batch.seeds for batch in (*first, *wanted, next(elsewhere))]
    assert len(np.unique(drawn)) == np.size(drawn)
    for opened in (batches, restored, elsewhere):
        opened.close()


def tuning(model: Path | str = "pico", **given: Any) -> TuningConfig:
    return TuningConfig(model=str(model), lora=LoraConfig(r=2, lora_dropout=0.3), max_length=32, batch_size=4, **given)


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_dtypes")
def test_a_run_that_goes_on_drops_what_it_would_have(tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    write_tiny_checkpoint(base, layers=2, width=16, heads=2, kv_heads=1, max_len=64)
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "data.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 12)
    training = TrainConfig(
        steps=6,
        plots=False,
        checkpoints=CheckpointConfig(save_steps=3),
        parallelism=Parallelism(micro_batches=2),
        optimizer=OptimizerConfig(learning_rate=0.05, schedule="constant"),
    )
    config = SftConfig(tuning=tuning(base, training=training), datasets=(Dataset(where=str(tmp_path / "data.jsonl")),))
    sft(config, run)
    wanted = [event["loss"] for event in read_events(run) if "loss" in event]
    shutil.rmtree(run / "checkpoints" / "6")
    sft(config, run)
    assert [event["loss"] for event in read_events(run) if "loss" in event] == wanted
    described = json.loads((run / "model" / "adapter_config.json").read_text())
    assert described["lora_dropout"] == 0.3


def test_where_nothing_may_be_dropped() -> None:
    data = Dataset(where="none.jsonl")
    with pytest.raises(ConfigError, match="nothing is dropped of the reference"):
        DpoConfig(tuning=tuning(), dataset=data)
    with pytest.raises(ConfigError, match="leave lora_dropout or chunk out"):
        EmbedConfig(tuning=tuning(), dataset=data, chunk=2)
    with pytest.raises(ConfigError, match="from 0 to below 1; it is 1.0"):
        LoraConfig(lora_dropout=1.0)
