"""`tenfold doctor` where all is well, and where no device answers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(400)  # compiles where the cache is cold


def doctor(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("tenfold")), "doctor"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


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
