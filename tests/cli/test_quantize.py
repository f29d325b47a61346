"""`tenfold quantize` as a shell sees it."""

import os
import subprocess
import sys
from pathlib import Path

from tenfold.testing.tiny import write_tiny_checkpoint

TENFOLD = str(Path(sys.executable).with_name("tenfold"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    wide = os.environ | {"COLUMNS": "200"}
    return subprocess.run([TENFOLD, "quantize", *arguments], capture_output=True, text=True, env=wide, timeout=110)


def test_a_model_is_quantised_and_both_perplexities_are_shown(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model", layers=1)
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 60)
    done = run(
        *(tmp_path / "model", "--output", tmp_path / "out", "--scheme", "int8"),
        *("--calibration", tmp_path / "text.txt", "--samples", "3", "--seed", "1"),
    )
    assert done.returncode == 0, done.stderr
    for shown in ("perplexity", "as they were", "int8", "%", f"tenfold serve {tmp_path / 'out'}"):
        assert shown in done.stdout
    assert (tmp_path / "out" / "config.json").exists()
    again = run(tmp_path / "model", "--output", tmp_path / "out", "--calibration", tmp_path / "text.txt")
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)
    assert "choose another output" in again.stderr


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    done = run("--output", tmp_path / "out", "--calibration", tmp_path / "none.txt")
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"tenfold: the calibration file {tmp_path / 'none.txt'} cannot be read: No such file or directory\n"
    )


def test_unknown_schemes_and_counts_are_refused(tmp_path: Path) -> None:
    for arguments in (["--scheme", "int3"], ["--samples", "0"]):
        assert run("--output", tmp_path / "out", *arguments).returncode == 2
    assert run().returncode == 2
