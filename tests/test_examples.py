"""Every example runs as its first line says, and says something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
QUICK = ("02_chat", "03_serve")  # the first has what 01_generate has, and others compile for a minute


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One compilation cache for all of them: they run the same programs."""
    return os.environ | {"TENFOLD_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


@pytest.mark.timeout(600)  # the first one compiles
@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow) for path in EXAMPLES],
    ids=lambda path: path.stem,
)
def test_runs(example, environment):
    done = subprocess.run([sys.executable, "-W", "error", example], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_is_short(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40
