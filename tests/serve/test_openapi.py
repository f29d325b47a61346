"""`schemathesis` derives requests from our OpenAPI document, valid and not, and holds the answers to it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import ServerProcess, end, start_scripted


@pytest.fixture(scope="module")
def small(letters_dir: Path) -> Iterator[ServerProcess]:
    """A server with short answers and an API key."""
    config = {"script": {"max_model_len": 64}, "server": {"api_keys": ["secret"]}}
    running = start_scripted(letters_dir, config)
    yield running
    end(running)


def test_answers_are_as_documented(small: ServerProcess, tmp_path: Path):
    """Statuses, content types, bodies, missing keys, wrong methods, and that invalid bodies are refused.

    Not that every valid one is accepted: a schema cannot say which token ids a model has, or how long its context is.
    """
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("run", f"{small.url}/openapi.json", "--header", "Authorization: Bearer secret", "--no-color"),
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance"),
        *("--max-examples", "10", "--seed", "1", "--generation-database", "none"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [line for line in small.log if "Traceback" in line]


def test_document(small: ServerProcess):
    document = small.get("/openapi.json").json()
    assert set(document["paths"]) == {
        *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model_id}"),
        *("/tokenize", "/detokenize", "/health", "/ready", "/version", "/metrics"),
    }
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {"200", "400", "401", "404", "413", "415", "429", "503"}
    assert chat["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/ChatRequest")
    assert chat["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/health"]["get"]
