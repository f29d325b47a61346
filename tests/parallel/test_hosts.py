"""Real processes that compute together over gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tenfold.base.errors import ConfigError
from tenfold.parallel.hosts import joined_hosts

pytestmark = pytest.mark.slow


def start(count: int, steps: int, directory: Path) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for i in range(count):
        places = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(i),
        }
        with (directory / f"{i}.err").open("w") as error:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.parallel.host", str(steps)],
                env=os.environ | places | {"JAX_NUM_CPU_DEVICES": "2"},
                stdout=subprocess.PIPE,
                stderr=error,
                text=True,
            )
            started.append(process)
    return started


def numbers(lines: Iterable[str]) -> Iterator[str]:
    """What a host printed, without what gloo did."""
    return (line.strip() for line in lines if re.fullmatch(r"shares .*|\d+ \d+\.\d+", line.strip()))


@pytest.mark.timeout(300)
def test_processes_compute_together(tmp_path: Path) -> None:
    processes = start(2, 3, tmp_path)
    printed = [list(numbers(process.communicate(timeout=250)[0].splitlines())) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], (tmp_path / "0.err").read_text()
    assert printed[0] == printed[1]
    assert printed[0][1:] == [f"{i} {24.0 * (i + 1)}" for i in range(3)]  # 2 · 4 · (1 + 2) numbers
    shares = json.loads(printed[0][0].removeprefix("shares "))
    assert {mesh: found for mesh, found in shares.items() if isinstance(found, list)} == {
        "data=4": [0, 1],
        "tensor=4": [0, 0],
        "data=2,tensor=2": [0, 1],
        "pipeline=2,data=2": [0, 0],  # each stage sees all rows
        "fsdp=2,context=2": [0, 1],
    }
    for mesh in ("data=2", ""):
        assert shares[mesh] == (
            "2 processes have 4 devices, and a run takes all of them: name a mesh of as many, such as --mesh data=4"
        )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_other_ends_and_says_why(victim: int, tmp_path: Path) -> None:
    processes = start(2, 1_000_000, tmp_path)
    for process in processes:
        assert process.stdout is not None
        lines = numbers(process.stdout)
        assert next(lines, "").startswith("shares"), (tmp_path / "0.err").read_text()
        assert next(lines, "").startswith("0 "), (tmp_path / "0.err").read_text()
    processes[victim].kill()
    processes[victim].communicate()
    survivor = processes[1 - victim]
    survivor.communicate(timeout=120)
    assert survivor.returncode != 0
    said = (tmp_path / f"{1 - victim}.err").read_text()
    # jax may hear of it before the devices do, and ends the others itself.
    ended_by_jax = survivor.returncode == -signal.SIGABRT and "another task died" in said
    assert "HostLostError: process" in said or ended_by_jax, said[-2000:]


def test_a_process_alone_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with joined_hosts() as count:
        assert count == 1


def test_half_a_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with (
        pytest.raises(ConfigError, match=r"JAX_NUM_PROCESSES \('2'\) must say how many .* JAX_PROCESS_ID \('2'\)"),
        joined_hosts(),
    ):
        raise AssertionError("it has joined nobody")
