"""The command line as a shell sees it."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tenfold.cli.options import GenerationConfig, LogLevel
from tenfold.cli.serve import serve
from tenfold.engine.config import EngineConfig

TENFOLD = str(Path(sys.executable).with_name("tenfold"))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    wide = os.environ | {"COLUMNS": "200"}
    return subprocess.run([TENFOLD, *arguments], capture_output=True, text=True, env=wide, timeout=100)


def test_version():
    import importlib.metadata

    done = run("--version")
    assert (done.returncode, done.stdout) == (0, importlib.metadata.version("tenfold") + "\n")


def test_help_names_every_command():
    done = run("--help")
    assert done.returncode == 0
    assert {"serve", "doctor", "train"} <= set(re.findall(r"\w+", done.stdout))
    assert run().returncode == 2


def test_options_have_vllms_names():
    shown = re.sub(r"\s+", " ", run("serve", "--help").stdout)
    for name in (
        *("host", "port", "api-key", "served-model-name", "tokenizer", "revision", "chat-template"),
        *("generation-config", "root-path", "ssl-keyfile", "ssl-certfile", "disable-uvicorn-access-log"),
        *("dtype", "max-model-len", "max-num-seqs", "max-num-batched-tokens", "block-size"),
        *(
            "kv-cache-memory-bytes",
            "gpu-memory-utilization",
            "enable-prefix-caching",
            "no-enable-prefix-caching",
            "seed",
        ),
    ):
        assert f"--{name}" in shown, name


def test_unknown_options_and_commands_are_refused():
    for arguments in (["serve", "--no-such-option"], ["no-such-command"], ["train", "gpt"], ["serve", "--port", "x"]):
        assert run(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-model-len", "4q"], "'4q' is not a size"),
        (["--max-num-seqs", "0"], "max_num_seqs must be at least 1"),
        (["--gpu-memory-utilization", "2"], "memory_utilization"),
        (["--port", "70000"], "port 70000 does not exist"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["./no-such-directory"], "no-such-directory"),
        (["--chat-template", "no-such-template"], "no-such-template"),
    ],
)
def test_what_cannot_work_is_one_line(arguments: list[str], words: str):
    done = run("serve", "--port", "0", *arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("tenfold: ")
    assert words in re.sub(r"\s+", " ", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_found_out_at_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("serve", "--port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--port" in done.stderr


def test_defaults_are_the_engines_own():
    """Options and EngineConfig must not drift apart."""
    import inspect

    defaults = {name: parameter.default for name, parameter in inspect.signature(serve).parameters.items()}
    config = EngineConfig()
    for name in (
        "max_num_seqs",
        "block_size",
        "enable_prefix_caching",
        "max_waiting",
        "dtype",
        "seed",
        "max_model_len",
    ):
        assert defaults[name] == getattr(config, name)
    assert int(defaults["max_num_batched_tokens"]) == config.max_num_batched_tokens
    assert defaults["gpu_memory_utilization"] == config.memory_utilization
    assert defaults["log_level"] is LogLevel.INFO
    assert defaults["generation_config"] is GenerationConfig.AUTO
