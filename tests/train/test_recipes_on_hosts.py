"""The recipes of fine-tuning on two hosts, which are processes over gloo: as on one with as many devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.models.family import resolve
from tenfold.nn import adapter_checkpoint, checkpoint
from tenfold.testing.tiny import write_tiny_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    for name, seed in (("model", 0), ("teacher", 1)):
        write_tiny_checkpoint(path / name, layers=1, width=16, heads=2, kv_heads=2, max_len=64, seed=seed)
    rows = {
        "chats": lambda i: {"messages": chat(f"q{i}", "yes")},
        "pairs": lambda i: {"chosen": chat(f"q{i}", "yes"), "rejected": chat(f"q{i}", "no")},
        "texts": lambda i: {"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i}"]},
    }
    for name, row in rows.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in range(12)))
    return path


def run(shared: Path, output: Path, mesh: str, hosts: int) -> dict[str, list[float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.train.recipes_on_hosts", str(shared), str(output), mesh]
    processes: list[subprocess.Popen[str]] = []
    for i in range(hosts):
        place = {"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_NUM_PROCESSES": str(hosts), "JAX_PROCESS_ID": str(i)}
        env: dict[str, str] = os.environ | (place if hosts > 1 else {}) | {"JAX_NUM_CPU_DEVICES": str(2 // hosts)}
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=env, cwd=Path(__file__).parents[2], text=True, **streams))
    said = [process.communicate(timeout=900) for process in processes]
    assert [process.returncode for process in processes] == [0] * hosts, said[0][1][-6000:]
    return json.loads(said[0][0].splitlines()[-1])


def test_hosts_train_what_one_would(shared: Path, tmp_path: Path) -> None:
    alone = run(shared, tmp_path / "alone", "tensor=2", 1)
    # Both hosts hold all rows, and so read the same ones.
    together = run(shared, tmp_path / "together", "tensor=2", 2)
    for name, losses in alone.items():
        np.testing.assert_allclose(together[name], losses, rtol=1e-5, err_msg=name)
    # Each holds half of them. Of examples, halves together are a batch of one host; documents are packed otherwise.
    spread = run(shared, tmp_path / "spread", "fsdp=2", 2)
    for name in ("dpo", "embed"):
        np.testing.assert_allclose(spread[name], alone[name], rtol=1e-5, err_msg=name)
    for name in ("sft", "distill"):
        assert len(spread[name]) == len(alone[name]) and np.isfinite(spread[name]).all()
    tree = resolve(checkpoint.read_config(shared / "model")).params()
    for output in (tmp_path / "together", tmp_path / "spread"):
        checkpoint.load(output / "embed" / "model", tree, jnp.float32)
        adapter_checkpoint.merge(shared / "model", output / "dpo" / "model", output / "merged", tree)
