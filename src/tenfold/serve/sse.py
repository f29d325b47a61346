"""Server-sent events, and noticing that a client has gone.

A stream writes each increment as it comes, and waits while the connection's buffer is full; what the engine produces
meanwhile is merged upstream, so a slow client costs bounded memory. The response's head is sent with the first event:
until then an error can still be a proper status.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tenfold.base.errors import TenfoldError
from tenfold.serve.errors import as_http_error, error_body

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
]

T = TypeVar("T")
Write = Callable[[bytes], Awaitable[None]]


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Run `work` to its end, or cancel it when the client goes away and return None.

    Args:
        receive: the request's; its body has been read.
        work: what the client waits for.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return None
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await one


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response whose events are written by `produce`.

    An error before the first event is raised, and becomes a response with its own status. A later one becomes a last
    event, `data: {"error": ...}`.

    Args:
        produce: is given a function that writes bytes; cancelled when the client goes away.
    """

    def __init__(self, produce: Callable[[Write], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_connected(receive, self._run(send))

    async def _run(self, send: Send) -> None:
        started = False

        async def write(data: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await self._produce(write)
            await write(DONE)
        except Exception as error:
            if not started:
                raise
            if not isinstance(error, TenfoldError):
                logger.exception("a stream failed")
            await write(b"data: " + error_body(as_http_error(error)) + b"\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
