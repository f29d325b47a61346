"""`tenfold train` as a shell sees it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold.base.errors import TenfoldError
from tenfold.cli.main import app
from tenfold.testing.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.slow

TENFOLD = str(Path(sys.executable).with_name("tenfold"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    wide = os.environ | {"COLUMNS": "200"}
    wide.pop("JAX_NUMPY_DTYPE_PROMOTION", None)  # optax multiplies floats with integers
    return subprocess.run(
        [TENFOLD, "train", "pretrain", *arguments], capture_output=True, text=True, env=wide, timeout=110
    )


def test_a_model_is_trained_by_the_options(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model", layers=1, max_len=64)
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 9)
    done = run(
        *("--model", tmp_path / "model", "--output", tmp_path / "out", "--max-steps", "3", "--batch-size", "4"),
        *("--dataset", tmp_path / "a.txt", "--dataset-weight", "3", "--dataset", tmp_path / "b.txt"),
        *("--dataset-weight", "1", "--max-length", "64", "--learning-rate", "0.01", "--optim", "muon"),
        *("--lr-scheduler-type", "wsd", "--decay-steps", "2", "--gradient-accumulation-steps", "2"),
        *("--dtype", "bfloat16", "--fp8", "--mesh", "fsdp=2", "--max-grad-norm", "0"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"The model is in {tmp_path}/out/model. Serve it with: tenfold serve {tmp_path}/out/model\n"
    assert "loss" in done.stderr and "tokens/s" in done.stderr
    assert (tmp_path / "out" / "model" / "config.json").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["optimizer"]["optimizer"] == "muon" and config["optimizer"]["max_grad_norm"] is None
    assert "cpu has no units for 8-bit floats" in done.stderr
    assert (config["steps"], config["dtype"], config["fp8"]) == (3, "bfloat16", True)
    assert (config["parallelism"]["mesh"], config["parallelism"]["micro_batches"]) == ("fsdp=2", 2)


def test_a_step_is_planned_for_devices_that_are_not_here(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model", layers=2, max_len=64)
    done = run(
        *("--model", tmp_path / "model", "--output", tmp_path / "out", "--dataset", "none.txt", "--max-length", "64"),
        *("--mesh", "data=8,fsdp=4", "--batch-size", "64", "--remat", "full", "--plan"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("32 devices: data=8 · fsdp=4\n")
    assert "all-gather along fsdp" in done.stdout
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path / "model", layers=1, max_len=64)
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n')
    options = ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--max-length", "64"]
    options += ["--dataset", str(tmp_path / "a.jsonl")]
    for more, message in (
        ([], "line 1 has no column 'text'; it has body. Name another one"),
        (["--profile", "3"], "--profile takes steps N:M, such as 10:12, not '3'"),
        (["--dataset-weight", "1", "--dataset-weight", "2"], "there are 1 --dataset and 2 --dataset-weight"),
    ):
        with pytest.raises(TenfoldError, match=message):
            app(["train", "pretrain", *options, *more], standalone_mode=False)
