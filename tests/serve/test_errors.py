"""Every refusal has its status and OpenAI's body."""

import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from tests.serve.conftest import ServerProcess, end, start_scripted, until
from tests.serve.letters import ids

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def error_of(response: httpx2.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


def test_bad_fields_never_reach_the_engine(server: ServerProcess):
    error = error_of(server.post(COMPLETIONS, {"prompt": "a", "max_tokens": -1}), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", "max_tokens")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": [261]}, "prompt"),
        (COMPLETIONS, {"prompt": "", "add_special_tokens": False}, "prompt"),
        (COMPLETIONS, {"prompt": [9] * 4096}, "prompt"),
        (COMPLETIONS, {"prompt": "a" * 4096}, "prompt"),
        (COMPLETIONS, {"prompt": "a" * 4096 * 256 + "a"}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 4096}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 4096 * 256}]}, "messages"),
        (COMPLETIONS, {"prompt": "a", "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        (COMPLETIONS, {"prompt": ["a"] * 1057}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 10, "n": 128}, "prompt"),
    ],
)
def test_requests_that_cannot_be_served(server: ServerProcess, path: str, body: dict, param: str):
    for stream in (False, True):
        assert error_of(server.post(path, body | {"stream": stream}), 400)["param"] == param


def test_what_the_template_says_is_what_the_client_reads(server: ServerProcess):
    error = error_of(server.post(CHAT, {"messages": [{"role": "tool", "content": "x"}]}), 400)
    assert "tools have no place here" in error["message"]


def test_unknown_models(server: ServerProcess):
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": HI}), ("/tokenize", {"prompt": "a"})):
        error = error_of(server.post(path, body | {"model": "gpt-4"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert error_of(server.get("/v1/models/gpt-4"), 404)["code"] == "model_not_found"


def test_unknown_addresses_and_methods(server: ServerProcess):
    error_of(server.get("/v1/embeddings"), 404)
    error_of(server.post("/v1/nothing", {}), 404)
    response = server.get(COMPLETIONS)
    error_of(response, 405)
    assert response.headers["allow"] == "POST"
    error_of(httpx2.delete(server.url + "/health"), 405)


@pytest.mark.parametrize("media_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_only_json(server: ServerProcess, media_type: str | None):
    headers = {} if media_type is None else {"content-type": media_type}
    error_of(server.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers), 415)
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"prompt": "a", "temperature": NaN}', b"[" * 100_000])
def test_bodies_that_are_not_json_objects(server: ServerProcess, content: bytes):
    response = server.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
    assert error_of(response, 400)["code"] == "invalid_json"


LIMIT = 16 * 2**20


class TestLength:
    def test_declared(self, server: ServerProcess):
        content = b'{"prompt": "' + b"a" * LIMIT + b'"}'
        response = server.post(COMPLETIONS, content=content, headers={"content-type": "application/json"})
        assert error_of(response, 413)["code"] == "request_too_large"

    def test_chunked(self, server: ServerProcess):
        """Refused once it is too long, not when it ends: it never does."""
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n"
            )
            chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
            for _ in range(LIMIT // 0x10000 + 1):
                connection.sendall(chunk)
            assert connection.recv(64).startswith(b"HTTP/1.1 413 ")

    def test_a_lying_length_is_refused_before_the_body(self, server: ServerProcess):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", COMPLETIONS)
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(10**15))
        connection.endheaders()
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == "request_too_large"
        connection.close()


@pytest.fixture(scope="module")
def guarded(letters_dir: Path) -> Iterator[ServerProcess]:
    """A server with two API keys."""
    running = start_scripted(letters_dir, {"server": {"api_keys": ["first", "sécond"]}})
    yield running
    end(running)


class TestKeys:
    @pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "first", "Basic first", "Bearer first,"])
    def test_refused(self, guarded: ServerProcess, header: str | None):
        headers = {} if header is None else {"authorization": header}
        for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
            response = guarded.post(path, {"prompt": "a"}, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        error_of(guarded.get("/v1/models", headers=headers), 401)
        error_of(guarded.get("/v1/nothing", headers=headers), 401)

    @pytest.mark.parametrize("header", [b"Bearer first", b"bearer first", "Bearer sécond".encode("latin-1")])
    def test_accepted(self, guarded: ServerProcess, header: bytes):
        headers = {b"authorization": header}
        assert guarded.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}, headers=headers).status_code == 200
        assert guarded.get("/v1/models", headers=headers).status_code == 200

    def test_open_addresses(self, guarded: ServerProcess):
        for path in ("/health", "/ready", "/metrics", "/version", "/docs", "/openapi.json"):
            assert guarded.get(path).status_code == 200, path


@pytest.fixture(scope="module")
def slow(letters_dir: Path) -> Iterator[ServerProcess]:
    """Its slow engine has room for one that runs and two that wait; the server itself takes eight."""
    settings = {
        "script": {"step_s": 0.05},
        "engine": {"max_num_seqs": 1, "max_waiting": 2, "max_num_batched_tokens": 8},
        "server": {"max_pending": 8},
    }
    running = start_scripted(letters_dir, settings)
    yield running
    end(running)


class TestOverload:
    def test_full_queue_of_the_engine(self, slow: ServerProcess):
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(slow.post, COMPLETIONS, {"prompt": "a", "max_tokens": 10}) for _ in range(8)]
            answers = [one.result() for one in asked]
        refused = [answer for answer in answers if answer.status_code != 200]
        assert 1 <= len(refused) <= 5
        for response in refused:
            error = error_of(response, 429)
            assert error["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
        assert slow.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200

    def test_one_prompt_too_many_aborts_its_fellows(self, slow: ServerProcess):
        body = {"prompt": ["a", "b", "c", "d"], "max_tokens": 4000, "ignore_eos": True}
        error_of(slow.post(COMPLETIONS, body), 429)
        until(lambda: slow.metrics()["tenfold_num_requests_running"] == 0)
        metrics = slow.metrics()
        assert metrics["tenfold_num_requests_waiting"] == metrics["tenfold_kv_cache_pages_used"] == 0

    def test_full_server(self, slow: ServerProcess):
        """Requests that stand in the server because their bodies never come."""
        host, port = slow.url.removeprefix("http://").split(":")
        with ExitStack() as stack:
            for _ in range(8):
                connection = stack.enter_context(socket.create_connection((host, int(port))))
                connection.sendall(
                    b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
                )
            until(lambda: slow.post("/tokenize", {"prompt": "a"}).status_code == 429)
            error_of(slow.post(COMPLETIONS, {"prompt": "a"}), 429)
            assert slow.get("/v1/models").status_code == 200
        until(lambda: slow.post("/tokenize", {"prompt": "a"}).status_code == 200)


def test_the_least_of_a_bad_request_reaches_the_log(server: ServerProcess):
    """No tracebacks: a client's mistakes are not the server's errors."""
    server.post(COMPLETIONS, {"prompt": [ids("a")[0], 999]})
    server.post(COMPLETIONS, {"prompt": "a", "x": 1})
    assert not [line for line in server.log if "Traceback" in line or "ERROR" in line]
