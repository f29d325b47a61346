"""Servers as real processes: over a scripted engine, whose every answer is known, and `tenfold serve` itself."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx2
import psutil
import pytest

from tests.serve import letters

START_S = 300.0
SCRIPTED_SERVER = Path(__file__).with_name("scripted_server.py")


@dataclass(kw_only=True)
class ServerProcess:
    """A server that runs.

    Attributes:
        url: without a path.
        output, log: lines of its standard output and error so far.
    """

    process: subprocess.Popen[str]
    url: str
    output: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    readers: list[threading.Thread] = field(default_factory=list)

    @property
    def engine_pid(self) -> int:
        """Process id of the engine that runs now."""
        return psutil.Process(self.process.pid).children()[0].pid

    def post(self, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        """Send JSON; `content` and `headers` say otherwise."""
        if body is not None:
            options["json"] = body
        return httpx2.post(self.url + path, timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60, **options)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The JSON of a stream's events; fails unless it ends as it should."""
        response = self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = response.text.split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        assert all(part.startswith("data: ") for part in parts[:-1])
        return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by name and labels except the model's name."""
        samples = {}
        for line in self.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                head, _, labels = name.partition("{")
                kept = [label for label in labels.rstrip("}").split(",") if label and "model_name=" not in label]
                samples[head + ("{" + ",".join(kept) + "}" if kept else "")] = float(value)
        return samples

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Ask it to stop and return its exit status."""
        self.process.send_signal(sig)
        return self.process.wait(60)


def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def start(command: list[str], ready: Callable[[str], bool]) -> ServerProcess:
    """Start a server's program and wait for the line of its output for which `ready` is true."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    server = ServerProcess(process=process, url="")
    assert process.stdout is not None
    assert process.stderr is not None
    done = threading.Event()

    def read_output(stream: IO[str]) -> None:
        with stream:
            for line in stream:
                server.output.append(line.rstrip("\n"))
                if ready(line):
                    done.set()
        done.set()

    def read_log(stream: IO[str]) -> None:
        with stream:
            server.log.extend(iter(stream.readline, ""))

    for read, stream in ((read_output, process.stdout), (read_log, process.stderr)):
        server.readers.append(threading.Thread(target=read, args=(stream,), daemon=True))
        server.readers[-1].start()
    if not done.wait(START_S) or not server.output:
        process.kill()
        pytest.fail("the server did not start:\n" + "".join(server.log))
    return server


def start_scripted(directory: Path, settings: dict[str, dict[str, Any]]) -> ServerProcess:
    """A server over a scripted engine; see `scripted_server` for the settings."""
    server = start([sys.executable, str(SCRIPTED_SERVER), str(directory), json.dumps(settings)], lambda _: True)
    server.url = server.output[0]
    return server


def end(server: ServerProcess) -> None:
    """Stop a server if it still runs. Its output ends with it: nothing that it started is left."""
    if server.process.poll() is None:
        server.process.terminate()
        try:
            server.process.wait(30)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
    for reader in server.readers:
        reader.join(30)
        assert not reader.is_alive()


@pytest.fixture(scope="session")
def letters_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of `letters`."""
    return letters.write(tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="session")
def server(letters_dir: Path) -> Iterator[ServerProcess]:
    """One server over a scripted engine for all tests that leave it as it is."""
    running = start_scripted(letters_dir, {})
    yield running
    end(running)


@pytest.fixture
def start_server(letters_dir: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of a test's own; the arguments are the settings."""
    started: list[ServerProcess] = []

    def start_one(**settings: dict[str, Any]) -> ServerProcess:
        started.append(start_scripted(letters_dir, settings))
        return started[-1]

    yield start_one
    for one in started:
        end(one)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of a few thousand weights."""
    from tenfold.testing.tiny import write_tiny_checkpoint

    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def tenfold_server(tiny_checkpoint: Path) -> Iterator[ServerProcess]:
    """`tenfold serve` with a tiny model, as a user starts it."""
    tenfold = str(Path(sys.executable).with_name("tenfold"))
    options = ["--port", "0", "--served-model-name", "tiny", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
    running = start([tenfold, "serve", str(tiny_checkpoint), *options], lambda line: line.startswith("print("))
    running.url = running.output[0].split()[1].partition("/v1/")[0]
    yield running
    end(running)
