"""The server's view of an engine that fails: every way ends with an error, a restart, or a clear end. Never silence."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tenfold.base.errors import EngineDeadError, MemoryBudgetError
from tenfold.engine.config import EngineConfig
from tenfold.engine.sampling_params import SamplingParams
from tenfold.runtime import EngineProcess, Watchdog
from tenfold.testing.scripted_engine import Script
from tests.runtime.waiting import until, within

LONG = SamplingParams(max_tokens=4000)
QUICK = Watchdog(stall_s=0.8, backoff_s=0.05)


async def collect(engine: EngineProcess, request_id: str, prompt: list[int], params: SamplingParams):
    """Every output of a request."""
    return [output async for output in engine.generate(request_id, prompt, params)]


async def put_under_load(process: EngineProcess, requests: int = 32) -> list[asyncio.Task]:
    """Starts long requests, of which some run and some wait."""
    tasks = [asyncio.create_task(collect(process, f"load {i}", [1], LONG)) for i in range(requests)]
    await until(lambda: process.stats.running + process.stats.waiting == requests)
    return tasks


async def assert_all_die(tasks: list[asyncio.Task]) -> None:
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, EngineDeadError), result


async def assert_serves(process: EngineProcess) -> None:
    await until(lambda: process.state == "ready", 20.0)
    assert process.healthy
    outputs = await collect(process, "after", [5], SamplingParams(max_tokens=3))
    assert [token for output in outputs for token in output.token_ids] == [6, 7, 8]


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


async def test_kill_9_under_load(engine, caplog):
    process = await engine(Script(step_s=0.005), config=EngineConfig(max_num_seqs=8))
    for restarts in (1, 2):
        tasks = await put_under_load(process)
        killed = process.pid
        os.kill(killed, signal.SIGKILL)
        with within(1.0):
            await until(lambda: not process.healthy)
            with pytest.raises(EngineDeadError):
                await collect(process, "meanwhile", [1], LONG)
            await assert_all_die(tasks)
        assert process.state == "restarting"
        await assert_serves(process)
        assert process.pid != killed
        assert process.restarts == restarts
    assert "killed by SIGKILL" in caplog.text
    await until(lambda: process.stats.running == 0)


async def test_stopped_process_with_work_waiting_is_red_within_five_seconds(engine):
    process = await engine(Script(step_s=0.005), config=EngineConfig(max_num_seqs=8))
    tasks = await put_under_load(process)
    stopped = process.pid
    os.kill(stopped, signal.SIGSTOP)
    assert await until(lambda: not process.healthy) < 5.0
    with within(1.0):
        await assert_all_die(tasks)
    await assert_serves(process)
    assert not is_alive(stopped)


async def test_stopped_process_is_noticed_without_work_too(engine, caplog):
    process = await engine(watchdog=QUICK)
    stopped = process.pid
    os.kill(stopped, signal.SIGSTOP)
    await until(lambda: process.restarts == 1)
    await assert_serves(process)
    assert not is_alive(stopped)
    assert "no sign of life" in caplog.text


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script(hang_at=7), "no sign of life"),
        (Script(spin_at=7, step_s=0.001), "no progress"),
        (Script(lose_at=7), "no progress"),
        (Script(raise_at=7), "ValueError"),
    ],
    ids=["hangs", "turns without effect", "forgets a request", "raises"],
)
async def test_engine_that_makes_no_progress_is_replaced(engine, caplog, script, reason):
    process = await engine(script, watchdog=QUICK)
    tasks = [asyncio.create_task(collect(process, str(i), [7], LONG)) for i in range(3)]
    with within(5.0):
        await assert_all_die(tasks)
    await assert_serves(process)
    assert reason in caplog.text


async def test_slow_steps_are_not_stalls(engine):
    """A step may take four times as long as the warm-up's estimate of the slowest."""
    process = await engine(Script(step_s=0.9, longest_step_s=0.5), watchdog=Watchdog(stall_s=0.4))
    outputs = await collect(process, "r", [1], SamplingParams(max_tokens=2))
    assert len(outputs) == 2
    assert process.restarts == 0


async def test_a_pause_of_the_server_itself_is_not_held_against_the_engine(engine):
    process = await engine(Script(step_s=0.01), watchdog=QUICK)
    outputs = process.generate("r", [1], SamplingParams(max_tokens=200))
    first = await anext(outputs)
    time.sleep(1.5)  # nothing is read, nothing is checked
    rest = [token async for output in outputs for token in output.token_ids]
    assert len(first.token_ids) + len(rest) == 200
    assert process.restarts == 0


async def test_what_cannot_be_loaded_is_said_at_once(engine, tmp_path):
    starts = tmp_path / "starts"
    process = await engine(Script(refuse_to_load=True, starts=str(starts)), start=False)
    with pytest.raises(MemoryBudgetError, match="2 GiB are free"):
        await process.start()
    assert process.state == "stopped"
    assert process.failure == "The model needs 3 GiB, and 2 GiB are free. Choose a smaller one."
    assert len(starts.read_text().splitlines()) == 1


async def test_crash_loop_at_the_first_start(engine, tmp_path):
    starts = tmp_path / "starts"
    process = await engine(Script(crash_from=1, starts=str(starts)), watchdog=QUICK, start=False)
    with pytest.raises(EngineDeadError, match="failed to start 3 times in a row: its process ended with status 3"):
        await process.start()
    assert process.state == "stopped"
    pids = [int(line) for line in starts.read_text().splitlines()]
    assert len(pids) == 3
    assert not any(is_alive(pid) for pid in pids)


async def test_crash_loop_after_having_been_ready(engine, tmp_path, caplog):
    starts = tmp_path / "starts"
    process = await engine(Script(crash_from=2, starts=str(starts), step_s=0.01), watchdog=QUICK)
    tasks = await put_under_load(process, 4)
    os.kill(process.pid, signal.SIGKILL)
    await assert_all_die(tasks)
    await until(lambda: process.state == "stopped", 20.0)
    assert not process.healthy
    assert process.failure is not None
    assert "failed to start 3 times in a row" in process.failure
    assert process.failure in caplog.text
    assert len(starts.read_text().splitlines()) == 4
    with pytest.raises(EngineDeadError, match="gone"):
        await collect(process, "r", [1], LONG)


async def test_start_that_takes_too_long(engine):
    process = await engine(Script(load_s=600.0), watchdog=Watchdog(start_s=0.7, max_starts=1), start=False)
    starting = asyncio.create_task(process.start())
    await until(lambda: process.pid is not None)
    pid = process.pid
    with within(10.0), pytest.raises(EngineDeadError, match="not ready within 1 s"):
        await starting
    assert not is_alive(pid)


async def test_cancelled_start_leaves_no_process(engine, tmp_path):
    starts = tmp_path / "starts"
    process = await engine(Script(load_s=600.0, starts=str(starts)), start=False)
    starting = asyncio.create_task(process.start())
    await until(starts.exists)
    await until(lambda: starts.read_text().endswith("\n"))
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert process.state == "stopped"
    assert not is_alive(int(starts.read_text()))


async def test_program_that_does_not_exist(tmp_path):
    process = EngineProcess(tmp_path, EngineConfig(), watchdog=QUICK, command=(str(tmp_path / "nothing"),))
    with pytest.raises(EngineDeadError, match="could not be started"):
        await process.start()


async def test_program_that_is_no_worker(tmp_path):
    nonsense = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).sendall(b'HTTP/1.1 200 OK' * 1000)"
    watchdog = Watchdog(max_starts=1)
    process = EngineProcess(tmp_path, EngineConfig(), watchdog=watchdog, command=(sys.executable, "-c", nonsense))
    with within(10.0), pytest.raises(EngineDeadError, match="failed to start"):
        await process.start()


async def test_death_while_draining_ends_the_drain(engine):
    process = await engine(Script(step_s=0.01))
    tasks = await put_under_load(process, 4)
    stopping = asyncio.create_task(process.stop(600.0))
    await until(lambda: process.state == "draining")
    os.kill(process.pid, signal.SIGKILL)
    with within(5.0):
        await assert_all_die(tasks)
        await stopping
    assert process.state == "stopped"
    assert process.restarts == 0


SERVER = """
import asyncio, os, signal, sys
from pathlib import Path
from tenfold.engine.config import EngineConfig
from tenfold.engine.sampling_params import SamplingParams
from tenfold.runtime import EngineProcess
from tenfold.testing.scripted_engine import Script, worker_command

async def main():
    engine = EngineProcess(Path("."), EngineConfig(), command=worker_command(Script(step_s=0.01)))
    await engine.start()
    async for _ in engine.generate("r", [1], SamplingParams(max_tokens=4000)):
        print(engine.pid, flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore
asyncio.run(main())
"""


def start_server() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
async def test_no_worker_outlives_its_server(how):
    with start_server() as server:
        assert server.stdout is not None
        pid = int(server.stdout.readline())
        assert is_alive(pid)
        server.send_signal(how)
        server.wait(10.0)
        await until(lambda: not is_alive(pid))


async def test_stop_while_restarting(engine, tmp_path):
    starts = tmp_path / "starts"
    process = await engine(Script(starts=str(starts)), watchdog=Watchdog(backoff_s=600.0))
    for _ in range(2):  # the second of two failures in a row has to wait
        await until(lambda: process.state == "ready")
        os.kill(process.pid, signal.SIGKILL)
        await until(lambda: process.state == "restarting")
    with within(5.0):
        await process.stop(600.0)
    assert process.state == "stopped"
    assert len(starts.read_text().splitlines()) == 2
