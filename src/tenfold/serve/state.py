"""What all endpoints share: the engine, the tokenizer, the metrics, and whether more work is taken in."""

import asyncio
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from tenfold.base.errors import OverloadedError, RequestError
from tenfold.data.tokenizer import Tokenizer
from tenfold.runtime.engine_process import EngineProcess
from tenfold.serve.config import ServerConfig
from tenfold.serve.errors import HttpError, unavailable
from tenfold.serve.metrics import Metrics

P = ParamSpec("P")
R = TypeVar("R")

TEXT_THREADS = 2
MAX_EVENT_INTERVAL_S = 0.1  # more would be seen
EVENTS_PER_S = 2000.0
CORES = os.cpu_count() or 1
EVENTS_PER_CORE = 100.0  # a second; an event takes about half a millisecond, here and in a client on this machine
MAX_CHARS_PER_TOKEN = 256  # no vocabulary's longest tokens, which are runs of spaces, come near it on average


class ServerState:
    """The server's objects and counters. Lives in one event loop.

    Args:
        engine: does the work.
        tokenizer: of the engine's model.
        config: how it is served.

    Attributes:
        metrics: what /metrics shows.
        in_flight: requests that are being answered.
        draining: the server has been asked to stop and takes no more requests.
    """

    def __init__(self, engine: EngineProcess, tokenizer: Tokenizer, config: ServerConfig) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.config = config
        self.metrics = Metrics(config.model_names[0], engine)
        self.in_flight = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._text_pool = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")

    @property
    def ready(self) -> bool:
        """Whether requests are taken in."""
        return not self.draining and self.engine.state == "ready"

    def require_ready(self) -> None:
        """Raises HttpError (503) unless requests are taken in."""
        if self.draining:
            raise unavailable("the server is shutting down; send the request to another, or again later")
        if self.engine.state != "ready":
            raise unavailable(f"the engine is {self.engine.state}; try again in a few seconds")

    def require_model(self, name: str | None) -> None:
        """Raises HttpError (404) if a request asks for a model that is not served here."""
        if name is not None and name not in self.config.model_names:
            served = ", ".join(f"`{served}`" for served in self.config.model_names)
            raise HttpError(
                404,
                f"The model `{name[:200]}` does not exist here; this server has {served}.",
                param="model",
                code="model_not_found",
            )

    def event_interval(self) -> float:
        """Shortest time between two events of one stream, in seconds, with as many streams as there are now."""
        return min(self.in_flight / self._max_events_per_s(), MAX_EVENT_INTERVAL_S)

    def _max_events_per_s(self) -> float:
        if self.config.max_events_per_s is not None:
            return self.config.max_events_per_s
        info = self.engine.info
        return EVENTS_PER_CORE * CORES if info and info.device.startswith("cpu") else EVENTS_PER_S

    def enter(self) -> None:
        """Counts a request in; `leave` counts it out again.

        Raises:
            OverloadedError: there are as many as may be.
            HttpError: 503, the server is shutting down.
        """
        if self.draining:
            self.require_ready()
        if self.in_flight >= self.config.max_pending:
            raise OverloadedError(
                f"{self.in_flight} requests are in this server already; try again later", retry_after_s=1.0
            )
        self.in_flight += 1
        self._idle.clear()

    def leave(self) -> None:
        """Counts out a request that was counted in."""
        self.in_flight -= 1
        if not self.in_flight:
            self._idle.set()

    async def drain(self) -> bool:
        """Take no more requests and wait for those in flight; whether they finished within the configured time."""
        self.draining = True
        try:
            async with asyncio.timeout(self.config.shutdown_timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def run_text(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run tokenisation or templating in a thread, so that streams go on meanwhile."""
        call: Callable[[], Any] = functools.partial(work, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._text_pool, call)

    async def encode(self, texts: Sequence[str], *, add_special_tokens: bool, param: str) -> list[list[int]]:
        """Token ids of prompts.

        Raises:
            RequestError: a text is so long that no spelling of it would fit the model.
            TokenizerError: the vocabulary cannot spell it.
        """
        info = self.engine.info
        longest = max(map(len, texts))
        if info is not None and longest > info.max_model_len * MAX_CHARS_PER_TOKEN:
            raise RequestError(
                f"the prompt has {longest} characters, which cannot fit the model's context of {info.max_model_len} "
                "tokens; shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return await self.run_text(self.tokenizer.encode_batch, texts, add_special_tokens=add_special_tokens)

    def close(self) -> None:
        """Stop the threads."""
        self._text_pool.shutdown(wait=False, cancel_futures=True)
