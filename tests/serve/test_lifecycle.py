"""The server from its first to its last second: starting, losing its engine, losing clients, stopping."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.serve.conftest import ServerProcess, end, start_scripted, until
from tests.serve.letters import ids

URL = "/v1/completions"
SLOW = {"script": {"step_s": 0.05}}
ENDLESS = {"prompt": "abc", "max_tokens": 4000, "ignore_eos": True}


def read_stream(server: ServerProcess, body: dict, first: threading.Event | None = None) -> list[dict]:
    """The events of a stream, to its end or to its error, which is the last."""
    events = []
    with httpx2.stream("POST", server.url + URL, json=body | {"stream": True}, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                if first is not None:
                    first.set()
    return events


def raw_request(body: dict, headers: bytes = b"") -> bytes:
    """A request as it goes over a socket."""
    content = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n%b"
        b"Content-Length: %d\r\n\r\n%b" % (headers, len(content), content)
    )


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def text_of(events: list[dict]) -> str:
    return "".join(choice["text"] for event in events for choice in event.get("choices", []))


@pytest.fixture(scope="module")
def slow(letters_dir: Path) -> Iterator[ServerProcess]:
    """A server whose engine takes its time, to load and to step."""
    running = start_scripted(letters_dir, {"script": {"load_s": 0.5, "step_s": 0.05}})
    yield running
    end(running)


class TestEngineDeath:
    def test_kill_under_load(self, slow: ServerProcess):
        first = threading.Event()
        with ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(read_stream, slow, ENDLESS, first) for _ in range(4)]
            whole = [pool.submit(slow.post, URL, ENDLESS) for _ in range(4)]
            assert first.wait(60)
            until(lambda: slow.metrics()["tenfold_num_requests_running"] == 8)
            os.kill(slow.engine_pid, signal.SIGKILL)
            began = time.monotonic()
            until(lambda: slow.get("/health").status_code == 503, 5.0)
            assert time.monotonic() - began < 5
            refused = slow.post(URL, {"prompt": "abc"})
            for stream in streams:
                *events, last = stream.result()
                assert last["error"]["code"] == "engine_dead"
                assert text_of(events).startswith("d")
            for one in whole:
                assert one.result().status_code == 503
                assert one.result().json()["error"]["code"] == "engine_dead"
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        until(lambda: slow.get("/ready").status_code == 200)
        assert slow.get("/health").status_code == 200
        assert slow.post(URL, {"prompt": "abc", "max_tokens": 3}).json()["choices"][0]["text"] == "def"
        metrics = slow.metrics()
        assert metrics["tenfold_engine_restarts_total"] == 1
        assert metrics['tenfold_request_success_total{finished_reason="error"}'] == 8

    def test_stall(self, start_server: Callable[..., ServerProcess]):
        trigger = ids("z")[0]
        server = start_server(script={"hang_at": trigger})
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(server.post, URL, {"prompt": [trigger]})
            until(lambda: server.get("/health").status_code == 503)
            assert asked.result().json()["error"]["code"] == "engine_dead"
        until(lambda: server.get("/health").status_code == 200)


class TestClientsThatGo:
    @pytest.mark.parametrize("stream", [True, False])
    def test_their_requests_end(self, slow: ServerProcess, stream: bool):
        host, port = slow.url.removeprefix("http://").split(":")
        aborted = 'tenfold_request_success_total{finished_reason="abort"}'
        before = slow.metrics()[aborted]
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(raw_request(ENDLESS | {"stream": stream}))
            until(lambda: slow.metrics()["tenfold_num_requests_running"] == 1)
        until(lambda: slow.metrics()["tenfold_num_requests_running"] == 0)
        metrics = slow.metrics()
        assert metrics["tenfold_kv_cache_pages_used"] == 0
        assert metrics[aborted] == before + 1

    def test_one_that_does_not_read_keeps_nobody_waiting(self, server: ServerProcess):
        """Its request goes on to its end in the engine; what the connection's buffers cannot hold is merged."""
        host, port = server.url.removeprefix("http://").split(":")
        before = server.metrics()["tenfold_generation_tokens_total"]
        asked = {"prompt": "abc", "n": 5, "max_tokens": 4000, "ignore_eos": True, "stream": True, "logprobs": 5}
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(raw_request(asked, b"Connection: close\r\n"))
            until(lambda: server.metrics()["tenfold_generation_tokens_total"] == before + 20_000, 90.0)
            assert server.post(URL, {"prompt": "abc", "max_tokens": 2}).json()["choices"][0]["text"] == "de"
            received = b"".join(iter(lambda: connection.recv(1 << 20), b""))
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert received.count(b"data: ") < 20_000


class TestStop:
    @pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
    def test_finishes_what_is_in_flight(self, start_server: Callable[..., ServerProcess], sig: int):
        server = start_server(**SLOW)
        engine_pid = server.engine_pid
        first = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(read_stream, server, {"prompt": "abc", "max_tokens": 40}, first)
            assert first.wait(60)
            server.process.send_signal(sig)
            until(lambda: server.get("/ready").status_code == 503)
            refused = server.post(URL, {"prompt": "abc"})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert len(text_of(stream.result())) == 40
            assert stream.result()[-1]["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0
        assert not is_alive(engine_pid)
        assert not [line for line in server.log if "Traceback" in line]

    def test_ends_what_takes_too_long(self, start_server: Callable[..., ServerProcess]):
        server = start_server(**SLOW, server={"shutdown_timeout_s": 0.3})
        first = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(read_stream, server, ENDLESS, first)
            assert first.wait(60)
            server.process.send_signal(signal.SIGTERM)
            assert stream.result()[-1]["error"]["code"] == "engine_dead"
        assert server.process.wait(60) == 0

    def test_a_second_signal_hurries(self, start_server: Callable[..., ServerProcess]):
        server = start_server(**SLOW)
        first = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            stream = pool.submit(read_stream, server, ENDLESS, first)
            assert first.wait(60)
            server.process.send_signal(signal.SIGINT)
            until(lambda: server.get("/ready").status_code == 503)
            server.process.send_signal(signal.SIGINT)
            assert stream.result()[-1]["error"]["code"] == "engine_dead"
        assert server.process.wait(60) == 0

    def test_the_engine_goes_with_a_killed_server(self, start_server: Callable[..., ServerProcess]):
        server = start_server()
        engine_pid = server.engine_pid
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        until(lambda: not is_alive(engine_pid))
