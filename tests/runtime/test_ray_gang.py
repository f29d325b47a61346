"""What a gang on Ray does of its own: choosing hosts, running a command on one, and saying who failed first.

A gang of real actors is in `tests/cli/test_many_hosts.py`.
"""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tenfold.base.errors import START_AGAIN, ConfigError
from tenfold.runtime.ray_gang import Ended, GangConfig, _choose_hosts, _culprit, _Host


def node(alive: bool = True, **resources: float) -> dict[str, object]:
    return {"Alive": alive, "Resources": resources}


def test_hosts_are_those_that_have_what_is_asked_for() -> None:
    nodes = [
        node(CPU=8),
        node(CPU=32, GPU=8),
        node(CPU=32, GPU=8),
        node(CPU=32, GPU=4),
        node(alive=False, CPU=8, GPU=8),
    ]
    anything = GangConfig(arguments=())
    assert _choose_hosts(nodes, anything) == ({"CPU": 1.0, "GPU": 8.0}, 2)
    assert _choose_hosts(nodes, GangConfig(arguments=(), accelerator=("gpu", 4))) == ({"CPU": 1.0, "GPU": 4.0}, 3)
    assert _choose_hosts(nodes, GangConfig(arguments=(), hosts=5)) == ({"CPU": 1.0, "GPU": 8.0}, 5)  # some may come
    assert _choose_hosts(nodes[:1], anything) == ({"CPU": 1.0}, 1)
    assert _choose_hosts([node(CPU=8, TPU=4)], anything) == ({"CPU": 1.0, "TPU": 4.0}, 1)
    with pytest.raises(ConfigError, match="none of Ray's 5 hosts has .*'TPU': 4.0"):
        _choose_hosts([*nodes[:4], node(CPU=0)], GangConfig(arguments=(), accelerator=("tpu", 4)))


def test_who_failed_first_is_not_who_failed_for_it() -> None:
    late = [Ended(START_AGAIN, ""), Ended(-signal.SIGABRT, ""), Ended(0, "")]
    for status in (1, 2, None, -signal.SIGKILL, -signal.SIGSEGV, 120):
        for at in range(4):
            ended = [*late[:at], Ended(status, ""), *late[at:]]
            assert _culprit(ended) == (at, ended[at])
    assert _culprit([Ended(START_AGAIN, ""), Ended(-signal.SIGABRT, "")])[0] == 1


def test_a_host_runs_the_command_and_keeps_its_last_lines(capfd: pytest.CaptureFixture[str]) -> None:
    status, tail = _Host(0).run(["train", "pretrain", "--no-such-option"], str(Path.cwd()), "127.0.0.1:1", 1)
    assert status == 2
    assert "No such option" in tail
    assert capfd.readouterr().out == tail


LEASH = "tenfold.runtime.leash"
LIVES = "import time; print('lives', flush=True); time.sleep(600)"


def test_a_command_does_not_outlive_what_started_it(tmp_path: Path) -> None:
    """Not even where that was killed."""
    (tmp_path / "lives.py").write_text(LIVES)
    starts = (
        "import subprocess, sys\n"
        f"process = subprocess.Popen([sys.executable, '-m', '{LEASH}', 'lives'], stdin=subprocess.PIPE)\n"
        "print(process.pid, flush=True)\n"
        "process.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert parent.stdout is not None
    said = {parent.stdout.readline().strip() for _ in range(2)}
    assert "lives" in said
    (number,) = said - {"lives"}
    child = psutil.Process(int(number))
    parent.kill()
    parent.communicate()
    gone, _ = psutil.wait_procs([child], timeout=30)
    assert gone


def test_a_host_that_is_told_to_stop_stops(tmp_path: Path) -> None:
    host = _Host(0)
    ended: list[tuple[int, str]] = []
    arguments = ["serve", "--port", "0"]
    runs = threading.Thread(target=lambda: ended.append(host.run(arguments, str(tmp_path), "127.0.0.1:1", 1)))
    runs.start()
    deadline = time.monotonic() + 60
    while host._process is None and time.monotonic() < deadline:
        time.sleep(0.01)
    host.stop()
    runs.join(timeout=60)
    assert ended and ended[0][0] in (0, -signal.SIGTERM)
