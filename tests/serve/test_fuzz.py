"""Random request bodies: every answer is a 2xx or an error in OpenAI's shape, and the server is well afterwards."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.serve.conftest import ServerProcess, end, start_scripted, until

MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
SAMPLING = {
    "model": "tiny",
    "max_tokens": 4,
    "n": 2,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"65": 1.5},
    "seed": 1,
    "stop": ["a", "bc"],
    "stop_token_ids": [66],
    "min_tokens": 1,
    "ignore_eos": False,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "priority": 1,
    "cache_salt": "x",
    "user": "u",
    "echo": True,
}
BODIES = [
    ("/v1/completions", {"prompt": "abc", "logprobs": 2, "best_of": 2, **SAMPLING}),
    ("/v1/completions", {"prompt": [65, 66], "stream": True, "stream_options": {"include_usage": True}, **SAMPLING}),
    ("/v1/completions", {"prompt": ["a", "b"], "prompt_logprobs": 1, **SAMPLING}),
    ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2, **SAMPLING}),
    ("/v1/chat/completions", {"messages": MESSAGES, "stream": True, "chat_template_kwargs": {"a": [1]}, **SAMPLING}),
    ("/tokenize", {"model": "tiny", "prompt": "abc", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": False, "continue_final_message": True}),
    ("/detokenize", {"tokens": [65, 66]}),
]
STRANGE: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 0.5, -0.5, 1e308, -1e308, 5e-324, 2**31 - 1, 2**31, 2**63, -(2**63), 2**64),
    *("", "a", " ", "\x00", "\ufeff", "é", "\U0001f389", "\u202e", "1", "null", "<|end|>", "{{ 7 * 7 }}", "a" * 3000),
    *([], {}, [None], [[]], [{}], [1, "a"], [[1], [2]], {"": ""}, {"type": "text"}, {"a": {"b": {"c": []}}}),
    *([0] * 600, ["a"] * 40, [[1]] * 40, {str(i): 1 for i in range(600)}),
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with every key or index of it."""
    children: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [(value, key) for key, _ in children] + [place for _, child in children for place in places(child)]


def mutate_fields(body: Any, rng: random.Random) -> None:
    """Change, remove, add or exchange fields."""
    for _ in range(rng.randint(1, 4)):
        container, key = rng.choice(places(body) or [({}, None)])
        if key is None:
            continue
        match rng.randrange(5):
            case 0 if isinstance(container, dict):
                del container[key]
            case 1 if isinstance(container, dict):
                name = rng.choice(["x", "", "tools", "suffix", "prompt", "messages", "stop", "n"])
                container[name] = copy.deepcopy(rng.choice(STRANGE))
            case 2:
                other, other_key = rng.choice(places(body))
                container[key] = copy.deepcopy(other[other_key])
            case _:
                container[key] = copy.deepcopy(rng.choice(STRANGE))


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, repeat, or replace some of the bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at, length = rng.randrange(len(data) + 1), rng.randint(0, 12)
        match rng.randrange(4):
            case 0:
                del data[at : at + length]
            case 1:
                data[at:at] = data[at : at + length] * rng.randint(1, 3)
            case 2:
                data[at:at] = rng.randbytes(length)
            case 3:
                data[at:at] = rng.choice(
                    [b"NaN", b"-Infinity", b"\\ud800", b"[" * 300, b"1" * 5000, b"//", b"\xc0\x80", b","]
                )
    return bytes(data)


def random_request(rng: random.Random) -> tuple[str, bytes]:
    path, body = copy.deepcopy(rng.choice(BODIES))
    kind = rng.random()
    if kind < 0.7:
        mutate_fields(body, rng)
    content = json.dumps(body, allow_nan=True).encode()
    return path, mutate_bytes(content, rng) if kind > 0.6 else content


def check(response: httpx2.Response, content: bytes) -> None:
    """The answer is what the documentation promises."""
    status = response.status_code
    if status == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            assert response.text.endswith("data: [DONE]\n\n"), (content, response.text)
            assert '"error"' not in response.text, (content, response.text)
        else:
            response.json()
        return
    assert 400 <= status < 500, (status, content, response.text)
    error = response.json()["error"]
    assert isinstance(error["message"], str)
    assert set(error) == {"message", "type", "param", "code"}


def fuzz(server: ServerProcess, cases: int, seed: int) -> None:
    rng = random.Random(seed)
    answered = 0
    with httpx2.Client(base_url=server.url, timeout=60, headers={"content-type": "application/json"}) as client:
        for _ in range(cases):
            path, content = random_request(rng)
            response = client.post(path, content=content)
            check(response, content)
            answered += response.status_code == 200
    assert cases / 20 < answered < cases * 19 / 20  # both sides of the border have been seen
    until(lambda: server.metrics()["tenfold_num_requests_running"] == 0)
    metrics = server.metrics()
    assert metrics["tenfold_engine_restarts_total"] == metrics["tenfold_kv_cache_pages_used"] == 0
    assert server.get("/health").status_code == 200
    assert not [line for line in server.log if "Traceback" in line]


def test_five_hundred(letters_dir: Path):
    settings = {"script": {"max_model_len": 128}, "server": {"model_names": ["tiny"]}}
    server = start_scripted(letters_dir, settings)
    try:
        fuzz(server, 500, seed=1)
    finally:
        end(server)


@pytest.mark.slow
def test_ten_thousand(tenfold_server: ServerProcess):
    fuzz(tenfold_server, 10_000, seed=2)
