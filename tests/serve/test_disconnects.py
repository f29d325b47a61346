"""Clients that go away at random moments leave nothing behind in the real engine."""

import asyncio
import json
import random

import psutil
import pytest

from tests.serve.conftest import ServerProcess, until

pytestmark = pytest.mark.timeout(400)  # the first start on a machine compiles

AT_ONCE = 32


def request(rng: random.Random) -> bytes:
    """A completion of up to 24 tokens as bytes on the wire."""
    body = {
        "prompt": [rng.randrange(256) for _ in range(rng.randint(1, 60))],
        "max_tokens": rng.randint(1, 24),
        "n": rng.choice((1, 1, 1, 2)),
        "stream": rng.random() < 0.5,
        "temperature": rng.choice((0, 1)),
        "ignore_eos": True,
    }
    content = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(content), content)
    )


async def ask(server: ServerProcess, rng: random.Random, *, leave: bool) -> bool:
    """Whether the whole answer came; a client that leaves does so before, after some bytes or after some time."""
    host, port = server.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        content = request(rng)
        if leave and rng.random() < 0.2:
            writer.write(content[: rng.randrange(len(content))])
            return False
        writer.write(content)
        if leave:
            try:
                async with asyncio.timeout(rng.uniform(0, 0.3)):
                    await reader.read(rng.choice((1, 300, 2000)))
            except TimeoutError:
                pass
            return False
        answer = await reader.read(-1)
        return answer.startswith(b"HTTP/1.1 200 ")
    finally:
        writer.close()


async def ask_many(server: ServerProcess, count: int, seed: int) -> int:
    """How many of `count` clients got their answers; every second one leaves."""
    rng = random.Random(seed)
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> bool:
        async with room:
            return await ask(server, rng, leave=number % 2 == 0)

    return sum(await asyncio.gather(*(one(number) for number in range(count))))


def memory(server: ServerProcess) -> int:
    """Resident bytes of the server and its engine."""
    process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in (process, *process.children()))


def test_five_hundred_of_which_half_leave(tenfold_server: ServerProcess):
    assert asyncio.run(ask_many(tenfold_server, 200, seed=1)) == 100  # buffers and arenas grow to their size
    before = memory(tenfold_server)
    assert asyncio.run(ask_many(tenfold_server, 500, seed=2)) == 250
    until(lambda: tenfold_server.metrics()["tenfold_num_requests_running"] == 0)
    metrics = tenfold_server.metrics()
    assert metrics["tenfold_num_requests_waiting"] == metrics["tenfold_kv_cache_pages_used"] == 0
    assert metrics["tenfold_engine_restarts_total"] == metrics["tenfold_compilations_since_ready_total"] == 0
    assert memory(tenfold_server) - before < 16 * 2**20
    assert not [line for line in tenfold_server.log if "Traceback" in line]
