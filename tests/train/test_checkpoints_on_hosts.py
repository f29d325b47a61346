"""Checkpoints of several real processes in an object store over a real socket; they share no directory."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from tenfold.train.checkpoints import CheckpointConfig, Checkpoints
from tests.base.servers import Server, writable_s3
from tests.train.checkpoints_on_hosts import advance, begin, described

STEPS = 5
HELD = r"/4/.*/state/trainable\.w/0\.[23]$"  # a part that the second process of two puts, of four devices


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with writable_s3(monkeypatch) as server:
        yield server


def start(directory: Path, count: int = 2, uri: str = "s3://bucket/run") -> list[subprocess.Popen[str]]:
    """Processes with four devices in all, each with a directory of its own for temporary files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    started = []
    for i in range(count):
        (directory / str(i)).mkdir(parents=True, exist_ok=True)
        environment = {
            "JAX_COORDINATOR_ADDRESS": coordinator,
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(i),
            "JAX_NUM_CPU_DEVICES": str(4 // count),
            "TMPDIR": str(directory / str(i)),
        }
        command = [sys.executable, "-m", "tests.train.checkpoints_on_hosts", uri, str(STEPS)]
        with (directory / f"{i}.err").open("w") as error:
            started.append(
                subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=error, text=True)
            )
    return started


def finish(processes: list[subprocess.Popen[str]], directory: Path) -> tuple[int, list[str]]:
    """The step that processes began from, and the losses that all say."""
    said = [process.communicate(timeout=500)[0] for process in processes]
    errors = "\n".join((directory / f"{i}.err").read_text()[-3000:] for i in range(len(processes)))
    assert [process.returncode for process in processes] == [0] * len(processes), errors
    lines = [re.findall(r"^(?:from|loss) .*$", text, re.MULTILINE) for text in said]
    assert all(each == lines[0] for each in lines)
    return int(lines[0][0].removeprefix("from ")), lines[0][1:]


def kill_while_held(s3: Server, processes: list[subprocess.Popen[str]], victims: slice = slice(None)) -> str:
    """Kills some while the server holds an object, and waits for the others to end; the path of that."""
    path = s3.holding.get(timeout=500)
    for process in processes[victims]:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    s3.held = None
    s3.release.set()
    return path


def copied(s3: Server) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(s3.files):
        found.setdefault(path.split("/")[3], []).append(path)
    return found


@pytest.mark.timeout(600)
def test_killed_while_they_copy_they_go_on_bit_for_bit_past_what_is_partial_or_damaged(
    s3: Server, tmp_path: Path
) -> None:
    _, whole = finish(start(tmp_path, uri="s3://bucket/whole"), tmp_path)
    assert len(whole) == STEPS
    s3.files.clear()

    s3.held = HELD
    path = kill_while_held(s3, start(tmp_path))
    there = copied(s3)
    assert {"2", "3", "4"} <= set(there)
    assert path not in there["4"] and not [path for path in there["4"] if path.endswith("COPIED-1")]

    # And of the one before, a part is damaged that only the second process needs.
    (damaged,) = (path for path in there["3"] if path.endswith("state/opt_state.m/0.3"))
    s3.files[damaged] = s3.files[damaged][:-1] + bytes([s3.files[damaged][-1] ^ 1])
    s3.requests.clear()
    first, losses = finish(start(tmp_path), tmp_path)
    assert first == 2
    assert losses == whole[2:]
    fetched = [path for method, path, _ in s3.requests if method == "GET" and re.search(r"/2/.*/trainable\.w/0", path)]
    assert sorted(path[-3:] for path in fetched) == ["0.0", "0.1", "0.2", "0.3"]  # each by the process that needs it
    assert set(copied(s3)) == {"3", "4", "5"}

    # Here one process has all devices.
    checkpoints = Checkpoints("s3://bucket/run", CheckpointConfig(save_total_limit=3))
    found = checkpoints.restore(described(begin()))
    assert found is not None and (found.step, found.host) == (STEPS, {"by": 2})
    expected = begin()
    for _ in range(STEPS):
        expected, _ = advance(expected)
    for have, want in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(have, want)
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_another_number_of_processes_goes_on_past_a_copy_that_others_left(s3: Server, tmp_path: Path) -> None:
    """Four, then two, then one; the parts of an attempt are not taken for another's."""
    s3.held = r"/3/.*/state/trainable\.w/0\.3$"
    kill_while_held(s3, start(tmp_path, 4))
    s3.held, s3.release = HELD, type(s3.release)()
    processes = start(tmp_path, 2)
    kill_while_held(s3, processes, slice(1, 2))
    assert processes[0].returncode in (75, -signal.SIGABRT)  # jax may be the first to hear of it
    assert {len({path.split("/")[4] for path in paths}) for step, paths in copied(s3).items() if step != "4"} == {1}
    first, losses = finish(start(tmp_path, 1), tmp_path)
    assert first == 3
    _, whole = finish(start(tmp_path, 1, uri="s3://bucket/whole"), tmp_path)
    assert losses == whole[3:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_process_that_cannot_read_a_copy_takes_no_other_than_the_rest(s3: Server, tmp_path: Path) -> None:
    finish(start(tmp_path), tmp_path)
    (about,) = (path for path in s3.files if "/5/" in path and path.endswith("host/metadata"))
    s3.once.add(about)  # the first that asks has it
    first, losses = finish(start(tmp_path), tmp_path)
    assert first == 4 and len(losses) == 1
