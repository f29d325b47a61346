"""The record of a run, where its time went, and whom its numbers are reported to."""

import time
from pathlib import Path

import pytest

from tenfold.base.errors import ConfigError
from tenfold.train.events import FILE, Events, Stopwatch, read_events
from tenfold.train.reporting import make_reporters


def test_events_of_steps_that_are_done_again_are_removed(tmp_path: Path) -> None:
    events = Events(tmp_path, 0)
    for step in (1, 2, 3):
        events.write({"step": step})
    events.rewind(2)
    events.write({"step": 3, "again": True})
    events.close()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 4, "cut o')  # as a killed run leaves it
    assert read_events(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    Events(tmp_path, 1).close()
    assert read_events(tmp_path) == [{"step": 1}]


def test_only_one_process_writes(tmp_path: Path) -> None:
    events = Events(tmp_path, 0, active=False)
    events.write({"step": 1})
    events.rewind(0)
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_time_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 seconds: a first step of 4 with its compilation, three steps of 2 of which the last is done in vain."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Stopwatch()
    now = 4.0
    assert clock.step() == 4.0
    for _ in range(3):
        with clock.on("data"):
            now += 0.5
        now += 1.5
        assert (clock.step(), clock.waited) == (2.0, 0.5)
    with clock.on("checkpoint"):
        now += 7.0
    now += 3.0
    assert (clock.step(), clock.waited) == (3.0, 0.0)
    clock.lose(2)
    assert now == 20.0
    assert clock.goodput == (2 + 2 + 2) / 20


def test_reporters_that_do_not_exist_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensorboard or mlflow, not to 'paper'"):
        make_reporters(["paper"], tmp_path)


def test_tensorboard_reads_what_is_reported(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (reporter,) = make_reporters(["tensorboard"], tmp_path)
    for step in (1, 2):
        reporter.report(step, {"loss": 1.0 / step})
    reporter.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_mlflow_keeps_what_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "tracked").as_uri())
    with pytest.raises(ConfigError, match="no place to keep the run: set MLFLOW_TRACKING_URI"):
        make_reporters(["mlflow"], tmp_path / "run")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (reporter,) = make_reporters(["mlflow"], tmp_path / "run")
    reporter.report(1, {"loss": 0.5})
    reporter.close()
    assert mlflow.last_active_run().data.metrics == {"loss": 0.5}


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'tenfold\[mlflow\]'"):
        make_reporters(["mlflow"], tmp_path)
