"""The loop learns, reports every step, and goes on after any end as if there had been none."""

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from tenfold.base.errors import CheckpointError, ConfigError, TrainingError
from tenfold.data.packing import Rows
from tenfold.train.batches import Batches
from tenfold.train.events import read_events
from tenfold.train.guard import GuardConfig
from tenfold.train.offload import HOST_MEMORY
from tenfold.train.optimizers import OptimizerConfig
from tenfold.train.parallelism import Parallelism
from tenfold.train.trainer import TrainConfig, Trained, train
from tests.train import runs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mixed_dtypes")]

STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All runs, those in other processes too, share their programs: compiling one takes longer than running it."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def run(
    run_dir: Path, steps: int = STEPS, *, batches: Batches | None = None, mesh: Any = None, **changes: Any
) -> Trained:
    config = runs.make_config(steps, **changes)
    return train(runs.make_job(mesh), config, batches or runs.make_batches(), run_dir)


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(event["step"], event["loss"]) for event in read_events(run_dir) if "loss" in event]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole")
    with jax.numpy_dtype_promotion("standard"):
        assert run(path, plots=True).finished
    return path


def test_a_rule_is_learnt_and_every_step_is_reported(whole: Path) -> None:
    found = losses(whole)
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert found[0][1] == pytest.approx(np.log(24), rel=0.1)  # nothing known: uniform over the vocabulary
    assert found[-1][1] < 0.5
    event = read_events(whole)[-1]
    assert event["grad_norm"] > 0 and event["tokens_per_s"] > 0 and 0 < event["goodput"] <= 1
    assert json.loads((whole / "config.json").read_text())["optimizer"]["learning_rate"] == 0.02
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (whole / "grad_norm.svg").read_text()
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["56", "60"]


def start(run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.train.runs", str(run_dir), str(STEPS)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


def wait_for_events(process: subprocess.Popen[str], run_dir: Path, count: int) -> None:
    while process.poll() is None and len(read_events(run_dir)) < count:
        time.sleep(0.01)


@pytest.mark.parametrize(("sent", "after"), [(signal.SIGKILL, 24), (signal.SIGTERM, 17)])
def test_a_killed_run_goes_on_bit_for_bit(sent: signal.Signals, after: int, whole: Path, tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_events(process, tmp_path, after)
    process.send_signal(sent)
    said, _ = process.communicate(timeout=300)
    if sent == signal.SIGTERM:  # it makes a checkpoint of where it is, and ends well
        assert process.returncode == 0
        stopped = int(said.removeprefix("stopped at "))
        assert after <= stopped < STEPS
        assert (tmp_path / "checkpoints" / str(stopped)).exists()
    else:
        assert process.returncode == -signal.SIGKILL
    assert len(losses(tmp_path)) < STEPS
    assert run(tmp_path).finished
    assert losses(tmp_path) == losses(whole)


# Reads that Orbax gives up, where one of them fails, report to an event loop that it has closed by then.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_run_goes_on_from_a_damaged_checkpoint_s_predecessor(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, 21)  # of which 14 and 21 are kept; the learning rate is another, so it is not compared
    data = max((tmp_path / "checkpoints" / "21" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 0xFF
    data.write_bytes(bytes(content))
    first = [event for event in losses(tmp_path) if event[0] <= 14]
    run(tmp_path, 21)
    assert losses(tmp_path)[:14] == first
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 22))
    assert (tmp_path / "checkpoints" / "damaged-21").is_dir()
    for path in (tmp_path / "checkpoints").glob("[0-9]*"):
        for file in (path / "state").rglob("d/*"):
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        run(tmp_path, 21)
    gc.collect()  # so that they report here, and not in the test that comes next


def test_a_run_goes_on_on_another_mesh(tmp_path: Path) -> None:
    """From 2 x 2 devices to 4 x 1 to one: the same losses but for the order of sums."""
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    run(whole, 21)
    config = runs.make_config(21)
    for mesh, until in (({"fsdp": 2, "tensor": 2}, 7), ({"data": 4}, 14), (None, 21)):
        process_until(moved, config, mesh, until)
    found, wanted = losses(moved), losses(whole)
    assert [step for step, _ in found] == [step for step, _ in wanted]
    np.testing.assert_allclose([loss for _, loss in found], [loss for _, loss in wanted], atol=1e-5)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 2}], ids=str)
def test_an_optimizer_on_the_host_trains_alike_and_goes_on(mesh: Any, tmp_path: Path) -> None:
    """What is saved is the same, too: a run may go on with its optimizer's state elsewhere."""
    offloaded = Parallelism(offload_optimizer=True)
    run(tmp_path / "devices", 14, mesh=mesh)
    trained = run(tmp_path / "host", 14, mesh=mesh, parallelism=offloaded)
    assert losses(tmp_path / "host") == losses(tmp_path / "devices")
    assert {x.sharding.memory_kind for x in jax.tree.leaves(trained.state.opt_state)} == {HOST_MEMORY}
    assert HOST_MEMORY not in {x.sharding.memory_kind for x in jax.tree.leaves(trained.state.trainable)}
    process_until(tmp_path / "moved", runs.make_config(14, parallelism=offloaded), mesh, 7)
    process_until(tmp_path / "moved", runs.make_config(14), mesh, 14)
    assert losses(tmp_path / "moved") == losses(tmp_path / "devices")


class Ending:
    """Batches that end a run by SIGTERM when so many are drawn: it stops at the step after."""

    def __init__(self, batches: Batches, until: int) -> None:
        self._batches, self._until = batches, until

    def __next__(self) -> Any:
        batch = next(self._batches)
        self._drawn += 1
        if self._drawn == self._until:
            signal.raise_signal(signal.SIGTERM)
        return batch

    _drawn = 0

    def get_state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "of": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]
        self._batches.set_state(state["of"])

    def close(self) -> None:
        self._batches.close()


def process_until(run_dir: Path, config: TrainConfig, mesh: Any, until: int) -> None:
    trained = train(runs.make_job(mesh), config, Ending(runs.make_batches(), until), run_dir)
    assert int(trained.state.step) == until
    assert trained.finished == (until == config.steps)


def test_another_model_is_not_taken_for_a_damaged_one(whole: Path) -> None:
    with pytest.raises(ConfigError, match="another model or optimizer: it has"):
        run(whole, optimizer=OptimizerConfig(optimizer="adafactor"))


class Poisoned:
    """Batches of which one has a weight that is no number."""

    def __init__(self, batches: Batches, number: int) -> None:
        self._batches, self._number, self._drawn = batches, number, 0

    def __next__(self) -> Rows:
        rows = next(self._batches)
        self._drawn += 1
        return rows._replace(weights=rows.weights * np.float32("nan")) if self._drawn == self._number else rows

    def get_state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "of": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]
        self._batches.set_state(state["of"])

    def close(self) -> None:
        self._batches.close()


def test_a_loss_that_is_no_number_names_its_batch(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the loss is nan at step 10, of batch 10, which is in") as caught:
        run(tmp_path, batches=Poisoned(runs.make_batches(), 10))
    kept = np.load(tmp_path / "batch-10-of-process-0.npz")
    assert str(tmp_path / "batch-10-of-process-0.npz") in str(caught.value)
    assert np.isnan(kept["weights"]).any() and kept["tokens"].shape == (runs.ROWS, runs.LENGTH)


def test_a_bad_batch_is_skipped_as_if_it_had_not_been(tmp_path: Path) -> None:
    skipping = GuardConfig(on_bad_step="skip")
    run(tmp_path / "poisoned", 20, batches=Poisoned(runs.make_batches(), 10), guard=skipping)

    clean = runs.make_batches()

    class Without(Poisoned):
        def __next__(self) -> Rows:
            self._drawn += 1
            rows = next(clean)
            return next(clean) if self._drawn == 10 else rows

    run(tmp_path / "clean", 20, batches=Without(clean, 10))
    assert losses(tmp_path / "poisoned") == losses(tmp_path / "clean")
    (event,) = [event for event in read_events(tmp_path / "poisoned") if "why" in event]
    assert event["skipped_batch"] == 10 and event["why"] == "the loss is nan"


def test_evaluations_profiles_and_the_best_checkpoint(tmp_path: Path) -> None:
    from dataclasses import replace

    scores = iter([3.0, 1.0, 2.0, 2.5])
    config = runs.make_config(28, eval_steps=7, profile=(2, 3))
    best = replace(config.checkpoints, metric_for_best_model="score", save_total_limit=1)
    trained = train(
        runs.make_job(),
        replace(config, checkpoints=best),
        runs.make_batches(),
        tmp_path,
        evaluate=lambda weights: {"score": next(scores)},
    )
    assert trained.finished
    evaluated = [(event["step"], event["score"]) for event in read_events(tmp_path) if "score" in event]
    assert evaluated == [(7, 3.0), (14, 1.0), (21, 2.0), (28, 2.5)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["14", "28"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_batches_that_do_not_divide_are_named_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 rows of a batch do not divide"):
        run(tmp_path, parallelism=Parallelism(micro_batches=3))
    assert read_events(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"dtype": "float16"}, "float32 or bfloat16"),
        ({"profile": (3, 2)}, "N:M"),
    ],
)
def test_options_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{"steps": 10} | changes)
