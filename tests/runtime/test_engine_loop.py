"""A worker from the outside: a real process, spoken to over its socket, one message at a time."""

import itertools
import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tenfold.engine.config import EngineConfig
from tenfold.engine.sampling_params import SamplingParams
from tenfold.runtime.messages import (
    Abort,
    Add,
    Command,
    Fatal,
    Heartbeat,
    Launch,
    Ready,
    Rejected,
    Report,
    Shutdown,
    Starting,
    Step,
    encode,
    read_reports,
)
from tenfold.testing.scripted_engine import Script, worker_command


class Worker:
    """A worker's process and the other end of its socket."""

    def __init__(self, script: Script, stderr: Path) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(10.0)
        with theirs, stderr.open("wb") as log:
            self.process = subprocess.Popen(
                [*worker_command(script), str(theirs.fileno())], pass_fds=(theirs.fileno(),), stderr=log
            )
        self.log = stderr
        self._reader = read_reports()
        self._received: list[Report] = []

    def send(self, *commands: Command) -> None:
        self.socket.sendall(b"".join(encode(command) for command in commands))

    def receive(self) -> Report:
        """The next report."""
        while not self._received:
            data = self.socket.recv(1 << 16)
            assert data, "the worker has closed the connection"
            self._received += self._reader.feed(data)
        return self._received.pop(0)

    def receive_until(self, wanted: Callable[[Report], object]) -> list[Report]:
        """All reports up to the first that is wanted."""
        reports = [self.receive()]
        while not wanted(reports[-1]):
            reports.append(self.receive())
        return reports

    def launch(self, config: EngineConfig | None = None) -> None:
        self.send(Launch("/model", config or EngineConfig(), logging.INFO))
        reports = self.receive_until(lambda report: isinstance(report, Ready))
        assert reports[:2] == [Starting(0, 1), Starting(1, 1)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def make(**script: object) -> Worker:
        workers.append(Worker(Script(**script), tmp_path / f"{len(workers)}.log"))
        return workers[-1]

    yield make
    for worker in workers:
        worker.socket.close()
        worker.process.kill()
        worker.process.wait(10.0)


def finished(count: int) -> Callable[[Report], bool]:
    """Whether so many completions have finished by now."""
    ended: list[str] = []

    def check(report: Report) -> bool:
        if isinstance(report, Step):
            ended.extend(output.request_id for output in report.outputs if output.finish_reason)
        return len(ended) >= count

    return check


def test_one_report_per_step_holds_all_outputs(start):
    worker = start()
    worker.launch()
    worker.send(*(Add(str(i), [10 * i], SamplingParams(max_tokens=3), 0, None) for i in range(1, 5)))
    steps = [r for r in worker.receive_until(finished(4)) if isinstance(r, Step)]
    tokens = {(o.request_id, o.token_ids) for step in steps for o in step.outputs}
    assert tokens == {(str(i), (10 * i + k,)) for i in range(1, 5) for k in range(1, 4)}
    assert max(len(step.outputs) for step in steps) > 1  # the scripted engine serves whoever is there


def test_beats_while_idle_while_busy_and_when_work_ends(start):
    worker = start(step_s=0.05)
    worker.launch()
    beats: list[float] = []
    while len(beats) < 4:
        if isinstance(worker.receive(), Heartbeat):
            beats.append(time.monotonic())
    worker.send(Add("1", [1], SamplingParams(max_tokens=30), 0, None))
    reports = worker.receive_until(finished(1))
    busy = [r for r in reports if isinstance(r, Heartbeat) and r.stats.running]
    assert len(busy) >= 2  # 1.5 s of work
    last = worker.receive()
    assert isinstance(last, Heartbeat)
    assert (last.stats.running, last.stats.pages_used, last.stats.generated_tokens) == (0, 0, 30)
    assert all(later - earlier < 2.0 for earlier, later in itertools.pairwise(beats))


def test_idle_worker_waits_without_spinning(start):
    worker = start()
    worker.launch()

    def cpu_seconds() -> float:
        fields = Path(f"/proc/{worker.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    worker.receive_until(lambda report: isinstance(report, Heartbeat))
    before = cpu_seconds()
    for _ in range(4):
        worker.receive_until(lambda report: isinstance(report, Heartbeat))
    assert cpu_seconds() - before < 0.2  # of two seconds


def test_refusals_say_why_and_leave_the_engine_alone(start):
    worker = start(step_s=0.01)
    worker.launch(EngineConfig(max_num_seqs=1, max_waiting=1))
    worker.send(
        Add("empty", [], SamplingParams(), 0, None),
        Add("first", [1], SamplingParams(n=2, max_tokens=5), 0, None),
        Add("full", [1], SamplingParams(n=3), 0, None),
    )
    reports = worker.receive_until(finished(1))
    refused = {r.request_id: r for r in reports if isinstance(r, Rejected)}
    assert set(refused) == {"empty", "full"}
    assert (refused["empty"].param, refused["empty"].retry_after_s) == ("prompt", None)
    assert refused["full"].retry_after_s == 2.5


def test_abort_stops_the_outputs_and_frees_the_pages(start):
    worker = start(step_s=0.01)
    worker.launch()
    worker.send(*(Add(name, [1], SamplingParams(max_tokens=4000), 0, None) for name in ("1", "2")))
    worker.receive_until(lambda r: isinstance(r, Step) and len(r.outputs) == 2)
    worker.send(Abort(["1", "no such request"]))
    worker.receive_until(lambda r: isinstance(r, Heartbeat) and r.stats.running == 1)
    after = worker.receive_until(lambda r: isinstance(r, Heartbeat))
    assert {o.request_id for r in after if isinstance(r, Step) for o in r.outputs} <= {"2"}
    worker.send(Abort(["2"]))
    worker.receive_until(lambda r: isinstance(r, Heartbeat) and r.stats.pages_used == 0)


def test_ends_cleanly_when_told_to_even_with_work(start):
    worker = start(step_s=0.01)
    worker.launch()
    worker.send(Add("1", [1], SamplingParams(max_tokens=4000), 0, None), Shutdown())
    assert worker.process.wait(10.0) == 0


def test_ends_with_an_error_when_pages_have_leaked(start):
    worker = start(step_s=0.01, leak_at=7)
    worker.launch()
    worker.send(Add("1", [7], SamplingParams(max_tokens=4000), 0, None))
    worker.receive_until(lambda r: isinstance(r, Step))
    worker.send(Abort(["1"]), Shutdown())
    fatal = worker.receive_until(lambda r: isinstance(r, Fatal))[-1]
    assert isinstance(fatal, Fatal)
    assert fatal.error == "AssertionError"
    assert worker.process.wait(10.0) == 1


def test_ends_when_the_server_goes_away(start):
    """Whatever the worker is doing: nothing, working, loading, hanging, or not having been told what to load."""
    idle, busy, loading, hanging, new = (
        start(),
        start(step_s=0.01),
        start(load_s=600.0),
        start(hang_at=7),
        start(),
    )
    for worker in (idle, busy, hanging):
        worker.launch()
    busy.send(Add("1", [1], SamplingParams(max_tokens=4000), 0, None))
    hanging.send(Add("1", [7], SamplingParams(), 0, None))
    loading.send(Launch("/model", EngineConfig(), logging.INFO))
    busy.receive_until(lambda r: isinstance(r, Step))
    loading.receive_until(lambda r: isinstance(r, Starting))
    for worker in (idle, busy, loading, hanging, new):
        worker.socket.close()
    assert [worker.process.wait(10.0) for worker in (idle, busy, new)] == [0, 0, 0]
    assert [worker.process.wait(10.0) for worker in (loading, hanging)] == [1, 1]


def test_signals_for_the_whole_program_are_left_to_the_server(start):
    worker = start()
    worker.launch()
    worker.process.send_signal(signal.SIGINT)
    worker.process.send_signal(signal.SIGTERM)
    worker.send(Add("1", [1], SamplingParams(max_tokens=2), 0, None))
    worker.receive_until(finished(1))


def test_tells_where_it_hangs(start):
    worker = start(hang_at=7)
    worker.launch()
    worker.send(Add("1", [7], SamplingParams(), 0, None))
    deadline = time.monotonic() + 10.0
    while "in step" not in worker.log.read_text():
        assert time.monotonic() < deadline
        worker.process.send_signal(signal.SIGUSR1)
        time.sleep(0.05)


def test_log_and_messages_never_hold_a_prompt(start):
    worker = start(raise_at=7, vocab_size=1 << 30)
    worker.launch()
    worker.send(Add("1", [987654321, 7], SamplingParams(), 0, None))
    fatal = worker.receive_until(lambda r: isinstance(r, Fatal))[-1]
    assert fatal == Fatal("ValueError", "the script says so")
    assert worker.process.wait(10.0) == 1
    log = worker.log.read_text()
    assert "ValueError: the script says so" in log
    assert "987654321" not in log


def test_what_it_cannot_read_ends_it(start):
    worker = start()
    worker.launch()
    worker.socket.sendall(b"\x00\x00\x00\x02\x91\xc0")
    assert worker.process.wait(10.0) == 0
    assert "cannot be read" in worker.log.read_text()
