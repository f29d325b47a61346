"""Where the numbers of a run are shown: one line on the screen, and TensorBoard and MLflow if asked for."""

import importlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tenfold.base.errors import ConfigError

REPORTERS = ("tensorboard", "mlflow")


@runtime_checkable
class Reporter(Protocol):
    """Is given the numbers of each step."""

    def report(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


def make_reporters(names: Sequence[str], run_dir: Path) -> list[Reporter]:
    """Reporters by name.

    Raises:
        ConfigError: one is unknown, its package is not installed, or it cannot keep the run.
    """
    made: list[Reporter] = []
    for name in names:
        if name not in REPORTERS:
            raise ConfigError(f"runs are reported to {' or '.join(REPORTERS)}, not to {name!r}")
        try:
            made.append(_TensorBoard(run_dir) if name == "tensorboard" else _MLflow(run_dir))
        except ImportError:
            raise ConfigError(f"reporting to {name} needs an extra package: pip install 'tenfold[{name}]'") from None
    return made


class _TensorBoard:
    """Event files in the run's directory, for `tensorboard --logdir`."""

    def __init__(self, run_dir: Path) -> None:
        self._event = importlib.import_module("tensorboard.compat.proto.event_pb2").Event
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        self._writer: Any = writer.EventFileWriter(str(run_dir / "tensorboard"))

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=f"train/{name}", simple_value=value) for name, value in numbers.items()]
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """A run of MLflow, at the tracking server that its own settings name."""

    def __init__(self, run_dir: Path) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        try:
            self._mlflow.start_run(run_name=run_dir.name)
        except self._mlflow.exceptions.MlflowException as error:
            raise ConfigError(
                "MLflow has no place to keep the run: set MLFLOW_TRACKING_URI to that of its server; or, for a file in "
                f"this directory, pip install mlflow. It says: {error}"
            ) from error

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class ProgressLine:
    """Loss, tokens a second, utilisation, goodput and time left, in one line on standard error.

    Args:
        steps: of the whole run.
        done: where it starts.
        shown: in one process only.
    """

    def __init__(self, steps: int, done: int, *, shown: bool) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._progress.add_task("compiling", total=steps, completed=done)
        self._progress.start()

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        if "loss" not in numbers:  # of an evaluation
            return
        parts = [f"loss {numbers['loss']:.4f}", f"{numbers['tokens_per_s']:,.0f} tokens/s"]
        if "mfu" in numbers:
            parts.append(f"MFU {numbers['mfu']:.1%}")
        parts.append(f"goodput {numbers['goodput']:.0%}")
        self._progress.update(self._task, completed=step, description="  ".join(parts))

    def close(self) -> None:
        self._progress.stop()
