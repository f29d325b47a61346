"""What happened in a run: a line of JSON per step, and where the time went."""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tenfold.base.files import atomic_write

FILE = "events.jsonl"


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run, oldest first; a last line that was not finished is none."""
    path = run_dir / FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Events:
    """Writes events.jsonl.

    Args:
        run_dir: exists.
        step: the run goes on from here: later events, of steps that will be done again, are removed.
        active: False writes nothing, in all processes of a run but one.
    """

    def __init__(self, run_dir: Path, step: int, *, active: bool = True) -> None:
        self._run_dir = run_dir
        self._file: IO[str] | None = None
        if active:
            self._file = self._open(step)

    def _open(self, step: int) -> IO[str]:
        kept = [event for event in read_events(self._run_dir) if event["step"] <= step]
        with atomic_write(self._run_dir / FILE) as file:
            file.writelines(f"{json.dumps(event)}\n".encode() for event in kept)
        return (self._run_dir / FILE).open("a", encoding="utf-8")

    def write(self, event: Mapping[str, Any]) -> None:
        """Appends an event, which has a "step"."""
        if self._file:
            self._file.write(f"{json.dumps(event)}\n")
            self._file.flush()

    def rewind(self, step: int) -> None:
        """Removes later events."""
        if self._file:
            self._file.close()
            self._file = self._open(step)

    def close(self) -> None:
        """Ends the file."""
        if self._file:
            self._file.close()


class Stopwatch:
    """Seconds since it was made, and what they were spent on.

    Attributes:
        waited: for data, in the last step.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._last_step = self._started
        self._productive: list[float] = []
        self._interrupted = self._on_data = self.waited = 0.0

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Times a block of "data", "checkpoint" or "evaluation"."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            if what == "data":
                self._on_data += seconds
            else:
                self._interrupted += seconds

    def step(self) -> float:
        """Ends a step and says how long it took, without checkpoints and evaluations."""
        now = time.perf_counter()
        seconds = now - self._last_step - self._interrupted
        self._last_step, self._interrupted = now, 0.0
        self.waited, self._on_data = self._on_data, 0.0
        self._productive.append(seconds)
        return seconds

    def lose(self, steps: int) -> None:
        """The last steps were in vain."""
        if steps:
            del self._productive[-steps:]
        self._last_step, self._interrupted, self._on_data = time.perf_counter(), 0.0, 0.0

    @property
    def goodput(self) -> float:
        """The share of all time that went into steps that count; the first step, which compiles, counts as another."""
        if not self._productive:
            return 0.0
        first = min(self._productive[0], self._typical())
        return (first + sum(self._productive[1:])) / (time.perf_counter() - self._started)

    def _typical(self) -> float:
        return sorted(self._productive)[len(self._productive) // 2]
