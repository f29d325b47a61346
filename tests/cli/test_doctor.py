"""`tenfold doctor` where all is well, where no device answers, and where the engine crashes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.timeout(400)  # compiles where the cache is cold


COMMAND = [str(Path(sys.executable).with_name("tenfold")), "doctor"]


def doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(COMMAND, capture_output=True, text=True, env=os.environ | environment)


def test_all_is_well():
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("versions", "memory", "caches", "devices", "generation"):
        assert f"\n{name}\n" in "\n" + done.stdout
    assert "cpu:0" in done.stdout
    assert "beginning with" in done.stdout
    assert done.stdout.endswith("Everything works.\n")


def test_what_fails_is_named():
    done = doctor(JAX_PLATFORMS="abacus")
    assert done.returncode == 1
    assert "FAILED: RuntimeError: " in done.stdout
    assert "'abacus'" in done.stdout
    assert done.stdout.endswith("Not working: devices, generation.\n")


def workers(pid: int) -> list[psutil.Process]:
    """The engines' processes that this one has started."""
    found = []
    for child in psutil.Process(pid).children():
        try:
            found += [child] if "tenfold.runtime.worker" in child.cmdline() else []
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_crash_of_the_engine_is_reported_and_not_tried_again():
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        seen: dict[int, psutil.Process] = {}
        while process.poll() is None:
            for worker in workers(process.pid):
                if worker.pid not in seen:
                    seen[worker.pid] = worker
                    worker.kill()
            time.sleep(0.01)
        stdout, stderr = process.communicate()
    assert len(seen) == 1, stderr
    assert process.returncode == 1
    assert "FAILED: EngineDeadError: The engine failed to start: its process was killed by SIGKILL." in stdout
    assert stdout.endswith("Not working: generation.\n")
