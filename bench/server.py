"""What the server costs, and what a long prompt does to others: 16 streaming clients on a real socket.

For each model: tokens/s of 16 greedy streams straight from the engine, then from `tenfold serve` through HTTP, taking
turns; then the time between tokens of 16 streams while a prompt of 2,000 tokens arrives.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import string
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import httpx2 as httpx
from checkpoints import half_billion
from workers import Worker

from tenfold.base.builtin import builtin_model

STREAMS, PROMPT = 16, 32
LETTERS = {str(ord(letter)): 100 for letter in string.ascii_lowercase}  # random weights would give tokens without text
SERVE = [str(Path(sys.executable).parent / "tenfold"), "serve"]


class Server:
    """`tenfold serve` in its own process, on a port of its own choice."""

    def __init__(self, checkpoint: Path, *options: str) -> None:
        command = [*SERVE, str(checkpoint), "--port", "0", "--served-model-name", "bench", "--max-num-seqs", "32"]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                self.url = found.group()
                return
        raise SystemExit("the server did not start; see its message above")

    def stop(self) -> None:
        """Drains and ends the process."""
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate()


def prompt(length: int) -> list[int]:
    """A prompt that nobody has asked before."""
    return [random.randrange(10, 250) for _ in range(length)]


async def stream(
    client: httpx.AsyncClient, length: int, tokens: int, bias: dict[str, int] | None = None
) -> list[float]:
    """Streams one completion; returns the times at which its text came: of every token, if all have some."""
    body = {
        "model": "bench", "prompt": prompt(length), "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True}, "logit_bias": bias,
    }  # fmt: skip
    times: list[float] = []
    async with client.stream("POST", "/v1/completions", json=body, timeout=600) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                assert chunk["usage"]["completion_tokens"] == tokens, chunk
            else:
                times.append(time.perf_counter())
    return times


async def serve_streams(url: str, tokens: int) -> float:
    """Tokens per second of 16 clients together."""
    async with httpx.AsyncClient(base_url=url) as client:
        start = time.perf_counter()
        await asyncio.gather(*(stream(client, PROMPT, tokens) for _ in range(STREAMS)))
        return STREAMS * tokens / (time.perf_counter() - start)


async def disturb(url: str, tokens: int, long: int) -> tuple[float, float]:
    """Median and 99th percentile of the time between tokens of 16 streams in which a long prompt arrives."""
    async with httpx.AsyncClient(base_url=url) as client:
        streams = [asyncio.create_task(stream(client, PROMPT, tokens, LETTERS)) for _ in range(STREAMS)]
        await asyncio.sleep(0.5)  # not waiting for anything: the long prompt is meant to come in the middle
        await stream(client, long, 1)
        gaps = [b - a for times in await asyncio.gather(*streams) for a, b in pairwise(times)]
    gaps.sort()
    return statistics.median(gaps), gaps[int(0.99 * len(gaps))]


def measure(name: str, checkpoint: Path, tokens: int, repeats: int) -> None:
    """Prints a model's rows."""
    worker, server = Worker("tenfold", checkpoint, dtype="auto"), Server(checkpoint)
    offline: list[float] = []
    served: list[float] = []
    for repeat in range(repeats + 1):
        direct = STREAMS * tokens / worker.seconds(STREAMS, PROMPT, tokens, vocabulary=250)
        through = asyncio.run(serve_streams(server.url, tokens))
        if repeat:  # the first round warms up
            offline.append(direct)
            served.append(through)
    ratio = statistics.median(s / o for s, o in zip(served, offline, strict=True))
    latencies = [asyncio.run(disturb(server.url, 2 * tokens, 2000)) for _ in range(repeats)]
    median, p99 = (statistics.median(values) for values in zip(*latencies, strict=True))
    worker.close()
    server.stop()
    print(f"{name}: engine {statistics.median(offline):.0f} tokens/s, server {statistics.median(served):.0f} tokens/s")
    print(f"{name}: between tokens while 2,000 arrive: median {median * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms")
    print(f"ratio, {name}, p99 to median between tokens: {p99 / median:.2f} (asked: at most 2)")
    print(f"ratio, {name}, server to engine: {ratio:.2f} (asked: at least 0.90)")


def main() -> None:
    """Measures the built-in model and a random one of 0.5 B weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=["pico", "0.5 B"], choices=["pico", "0.5 B"])
    arguments = parser.parse_args()
    for name in arguments.models:
        checkpoint, tokens = (builtin_model(), 256) if name == "pico" else (half_billion(), 48)
        measure(name, checkpoint, tokens, arguments.repeats)


if __name__ == "__main__":
    main()
