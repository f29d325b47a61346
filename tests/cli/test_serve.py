"""What `tenfold serve` prints works as it stands."""

import json
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.conftest import ServerProcess, end, start

pytestmark = pytest.mark.timeout(400)  # the first start on a machine compiles
KEY = "opensesame"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A tiny model under its own path as its name, with defaults of its own, behind a key."""
    from tenfold.testing.tiny import write_tiny_checkpoint

    directory = tmp_path_factory.mktemp("it's a model")
    write_tiny_checkpoint(directory)
    config = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(config | {"do_sample": False, "max_new_tokens": 5}))
    options = ["--port", "0", "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--api-key", KEY]
    command = [str(Path(sys.executable).with_name("tenfold")), "serve", str(directory), *options]
    running = start(command, lambda line: line.startswith("print("))
    running.url = running.output[0].split()[1].partition("/v1/")[0]
    yield running
    end(running)


def test_four_lines_and_nothing_else(served: ServerProcess):
    assert [line.split("(")[0].split()[0] for line in served.output] == ["curl", "from", "client", "print"]


def test_the_line_of_curl(served: ServerProcess):
    """Run as curl would: urllib sends what the line says."""
    words = shlex.split(served.output[0])
    headers = dict(words[i + 1].split(": ") for i, word in enumerate(words) if word == "-H")
    assert headers.pop("Authorization") == "Bearer YOUR_API_KEY"
    data = words[words.index("-d") + 1].encode()
    request = urllib.request.Request(words[1], data, {**headers, "Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request) as response:
        assert json.load(response)["choices"][0]["message"]["role"] == "assistant"


def test_the_lines_of_python(served: ServerProcess):
    code = "\n".join(served.output[1:4]).replace("YOUR_API_KEY", KEY)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_models_own_sampling_is_the_default(served: ServerProcess):
    """Greedy, and five tokens, both only until the request says otherwise."""

    def ask(**body: object) -> dict:
        answer = served.post("/v1/completions", {"prompt": "abc"} | body, headers={"Authorization": f"Bearer {KEY}"})
        return answer.json()

    first = ask(ignore_eos=True)
    assert first["usage"]["completion_tokens"] == 5
    assert ask(ignore_eos=True)["choices"] == first["choices"] == ask(ignore_eos=True, temperature=0)["choices"]
    assert ask(ignore_eos=True, max_tokens=7)["usage"]["completion_tokens"] == 7
    drawn = {ask(ignore_eos=True, temperature=1.5)["choices"][0]["text"] for _ in range(5)}
    assert len(drawn) > 1


def test_interrupt_ends_it_well(served: ServerProcess):
    import signal

    assert served.stop(signal.SIGINT) == 0
    assert not [line for line in served.log if "Traceback" in line]
