"""A request's outputs between the engine, which does not wait, and a consumer, which may be slow."""

import asyncio
from collections.abc import Callable, Sequence
from itertools import chain

from tenfold.base.errors import TenfoldError
from tenfold.engine.outputs import EngineOutput

_MERGE_EVERY = 64  # outputs; so that merging a long backlog copies every token a few times and not once per step


class OutputStream:
    """Holds what the consumer has not taken yet, merged into one output per completion.

    What it holds is bounded by the lengths of the completions, however slow the consumer. For use within one event loop
    and by one consumer.

    Args:
        request_id: the consumer's name for the request; it stands in the outputs taken.
        n: completions that will come.
        interval_s: says, after every output, the time to the next in seconds; what comes sooner is merged, so that a
            fast engine does not cost its consumer a wake-up per token. Streams of one interval keep the same beat: one
            wake-up serves them all. The first output and the end of a completion do not wait.
    """

    def __init__(self, request_id: str, n: int, interval_s: Callable[[], float] | None = None) -> None:
        self.request_id = request_id
        self._unfinished = n
        self._pending: dict[int, list[EngineOutput]] = {}
        self._error: TenfoldError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._interval_s = interval_s
        self._loop = asyncio.get_running_loop()
        self._due = 0.0  # on the loop's clock: when the next output may be taken

    def put(self, output: EngineOutput) -> bool:
        """Adds what one step produced for one completion; True when this was the last output of the last completion."""
        pending = self._pending.setdefault(output.index, [])
        pending.append(output)
        if len(pending) == _MERGE_EVERY:
            pending[:] = [merge_outputs(pending)]
        if output.finish_reason is not None:
            self._unfinished -= 1
            self._due = 0.0
        if not self._due or self._loop.time() >= self._due:
            self._wake()
        return self._unfinished == 0

    def close(self, error: TenfoldError | None = None) -> None:
        """Says that nothing more will come. The consumer still gets what is pending, then the error if there is one."""
        self._unfinished = 0
        self._error = error
        self._due = 0.0
        self._wake()

    def drop(self) -> None:
        """Forgets what is pending and ends the stream."""
        self._pending.clear()
        self.close()

    async def get(self) -> EngineOutput | None:
        """The next output, of the completion that has waited longest; None after the last.

        Raises:
            TenfoldError: what `close` was given, once nothing is pending.
        """
        while not self._pending or (self._due and self._loop.time() < self._due):
            if not self._pending:
                if self._error is not None:
                    raise self._error
                if self._unfinished == 0:
                    return None
            await self._wait()
        pending = self._pending.pop(next(iter(self._pending)))
        if self._interval_s is not None and self._unfinished and not self._pending:
            self._due = _next_beat(self._loop.time(), self._interval_s())
        return EngineOutput(self.request_id, *merge_outputs(pending)[1:])

    async def _wait(self) -> None:
        """Returns when there may be something to take: something has come, or what has come is due."""
        self._waiter = self._loop.create_future()
        early = self._due and self._loop.time() < self._due
        timer = self._loop.call_at(self._due, self._wake) if early else None
        try:
            await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _next_beat(now: float, interval: float) -> float:
    """The next of all the times that are multiples of the interval."""
    return (now // interval + 1) * interval if interval > 0 else now


def merge_outputs(outputs: Sequence[EngineOutput]) -> EngineOutput:
    """One output that says what several consecutive outputs of the same completion say."""
    first, last = outputs[0], outputs[-1]
    if len(outputs) == 1:
        return first
    return first._replace(
        token_ids=tuple(chain.from_iterable(output.token_ids for output in outputs)),
        logprobs=None
        if first.logprobs is None
        else tuple(chain.from_iterable(output.logprobs or () for output in outputs)),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
    )
