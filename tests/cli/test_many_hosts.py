"""Runs of `tenfold train` on two hosts, which here are processes that compute together over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tenfold.base.errors import START_AGAIN
from tenfold.testing.tiny import write_tiny_checkpoint
from tenfold.train.events import read_events
from tests.base.servers import writable_s3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

TENFOLD = str(Path(sys.executable).with_name("tenfold"))
STEPS, SAVE_STEPS = 60, 20
HEARTBEAT_S = 30


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both hosts see."""
    path = tmp_path_factory.mktemp("shared")
    write_tiny_checkpoint(path / "model", layers=1, width=32, max_len=64)
    rows = [json.dumps({"text": f"one {n} two {n} three {n} " * (1 + n % 4)}) for n in range(50)]
    (path / "corpus.jsonl").write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """One device to a host; and optax multiplies floats with integers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        patch.delenv("JAX_NUMPY_DTYPE_PROMOTION")
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


def test_hosts_that_do_not_share_their_output_are_refused(shared: Path, tmp_path: Path) -> None:
    processes = start(shared, tmp_path / "a", tmp_path / "b")
    for process in processes:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 1, said
        assert "tenfold: host 1 of 2 does not share" in said


def arguments(shared: Path, output: Path) -> list[str]:
    return [
        *("pretrain", "--from-scratch", "--model", str(shared / "model"), "--dataset", str(shared / "corpus.jsonl")),
        *("--output", str(output), "--mesh", "fsdp=2", "--max-length", "64", "--batch-size", "4"),
        *("--max-steps", str(STEPS), "--save-steps", str(SAVE_STEPS), "--lr-scheduler-type", "constant"),
    ]


def start(
    shared: Path, output: Path, other: Path | None = None, more: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    """Both hosts, of which the second one may write elsewhere."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    places = ({"JAX_COORDINATOR_ADDRESS": coordinator, "JAX_PROCESS_ID": str(i)} for i in range(2))
    return [
        subprocess.Popen(
            [TENFOLD, "train", *arguments(shared, where), *more],
            env=os.environ | place | {"JAX_NUM_PROCESSES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place, where in zip(places, (output, other or output), strict=True)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What processes wrote, which are to end well."""
    said = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)[-6000:]
    return said


def losses(output: Path) -> list[tuple[int, float, float]]:
    return [(event["step"], event["loss"], event["grad_norm"]) for event in read_events(output)]


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not reached() and process.poll() is None:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(shared: Path, environment: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    output = tmp_path_factory.mktemp("whole")
    said = finish(start(shared, output))
    assert "The model is in" in said[0]
    assert [step for step, *_ in losses(output)] == list(range(1, STEPS + 1))
    assert (output / "model" / "model.safetensors").exists()
    return output


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_host_ends_the_other_and_both_go_on_bit_for_bit(
    victim: int, shared: Path, whole: Path, tmp_path: Path
) -> None:
    processes = start(shared, tmp_path)
    wait_until(lambda: len(losses(tmp_path)) >= SAVE_STEPS + SAVE_STEPS // 2, processes[0])
    processes[victim].kill()
    killed = time.monotonic()
    survivor = processes[1 - victim]
    said, _ = survivor.communicate(timeout=300)
    assert time.monotonic() - killed < HEARTBEAT_S + 15
    assert processes[victim].wait() == -signal.SIGKILL
    processes[victim].communicate()
    # jax may hear of it before the devices do, and ends the others itself.
    if survivor.returncode == -signal.SIGABRT:
        assert "distributed service detected fatal errors" in said
    else:
        assert survivor.returncode == START_AGAIN, said[-4000:]
        assert f"tenfold: process {1 - victim} of 2 cannot go on: another one is gone" in said
    assert SAVE_STEPS <= len(losses(tmp_path)) < STEPS
    finish(start(shared, tmp_path))
    assert losses(tmp_path) == losses(whole)


def test_hosts_that_share_nothing_but_an_object_store_go_on_bit_for_bit(
    shared: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = (tmp_path / "a", tmp_path / "b")
    with writable_s3(monkeypatch) as s3:
        store = ("--checkpoint-dir", "s3://bucket/run")
        processes = start(shared, *outputs, more=store)
        s3.held = rf"/run/{2 * SAVE_STEPS}/.*/COPIED-1$"
        s3.holding.get(timeout=600)
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()
        s3.held = None
        s3.release.set()
        said = finish(start(shared, *outputs, more=store))
        assert "is also in s3://bucket/run/output." in said[0] and "s3://" not in said[1]
        kept = {path.removeprefix("/bucket/run/output/"): body for path, body in s3.files.items() if "/output/" in path}
    assert losses(outputs[0]) == losses(whole)
    assert not (outputs[1] / "model").exists()
    assert kept["model/model.safetensors"] == (whole / "model" / "model.safetensors").read_bytes()
    assert kept["events.jsonl"] == (outputs[0] / "events.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore:os.fork")  # by Ray, before it starts another program
def test_hosts_on_ray_start_again_and_stop_together(shared: Path, whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    output = tmp_path / "out"
    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        environment = os.environ | {"RAY_ADDRESS": cluster.address}

        def start_gang(*more: str) -> subprocess.Popen[str]:
            command = [TENFOLD, "train", *arguments(shared, output), *more, "--on", "ray", "--hosts", "2"]
            with (tmp_path / "said").open("w") as file:
                return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, text=True)

        def said() -> str:
            return (tmp_path / "said").read_text()

        gang = start_gang()
        wait_until(lambda: len(losses(output)) >= SAVE_STEPS + SAVE_STEPS // 2, gang)
        actor = find_host(output, 1).parent()
        assert actor is not None, said()
        actor.kill()
        assert gang.wait(timeout=900) == 0, said()[-6000:]
        assert "host 1 of 2 is lost" in said()
        assert "All are started again, from the last checkpoint (1 of 3 times)" in said()
        assert losses(output) == losses(whole)
        assert (output / "model" / "model.safetensors").exists()

        gang = start_gang("--max-steps", "1000000")  # the last one counts
        wait_until(lambda: len(losses(output)) >= STEPS + 10, gang)
        gang.terminate()
        assert gang.wait(timeout=300) == 0, said()[-6000:]
        assert "Stopped. The same command goes on from its last checkpoint.\n" in said()
        stopped = len(losses(output))
        assert stopped >= STEPS + 10 and (output / "checkpoints" / str(stopped)).exists()
    finally:
        cluster.shutdown()


def find_host(output: Path, index: int) -> psutil.Process:
    """The process of one host of a gang."""
    for process in psutil.process_iter():
        try:
            if str(output) in process.cmdline() and process.environ().get("JAX_PROCESS_ID") == str(index):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"host {index} does not run")
