"""Waiting for conditions, with a limit."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> float:
    """Waits until the condition holds and returns the seconds that it took; fails if it does not in time."""
    began = time.monotonic()
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)
    return time.monotonic() - began


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails if the block takes longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds
