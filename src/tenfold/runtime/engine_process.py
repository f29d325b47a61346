"""The server's engine: a worker process, its requests, and the watch over it."""

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tenfold.base.errors import (
    CheckpointError,
    ConfigError,
    EngineDeadError,
    MemoryBudgetError,
    OverloadedError,
    RequestError,
    TenfoldError,
    UnsupportedModelError,
)
from tenfold.engine.config import EngineConfig
from tenfold.engine.outputs import EngineOutput, EngineStats, ModelInfo
from tenfold.engine.sampling_params import SamplingParams
from tenfold.runtime.messages import Abort, Add, Fatal, Heartbeat, Launch, Rejected, Report, Starting, Step
from tenfold.runtime.output_stream import OutputStream
from tenfold.runtime.worker_process import WORKER_COMMAND, WorkerProcess

State = Literal["starting", "ready", "restarting", "draining", "stopped"]

STALL_STEPS = 4.0  # a step that takes this many times as long as the slowest that there can be hangs
MAX_UNSENT_BYTES = 1 << 24
_TICK_S = 0.25
_SHUTDOWN_S = 5.0
_REFUSALS = {
    error.__name__: error for error in (CheckpointError, ConfigError, MemoryBudgetError, UnsupportedModelError)
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Watchdog:
    """When a worker is given up, and how its successors are started. All times in seconds.

    Attributes:
        stall_s: without a sign of life, or without progress while there is work, it has stalled; more where the
            model's own steps are slow.
        start_s: longest that loading and compiling may take.
        max_starts: in a row that may fail before no more are tried.
        backoff_s: wait before the second of several restarts in a row (none before the first); then doubling.
        max_backoff_s: longest wait.
        stable_s: a worker that served this long is not part of a row.
    """

    stall_s: float = 4.0
    start_s: float = 1800.0
    max_starts: int = 3
    backoff_s: float = 0.5
    max_backoff_s: float = 30.0
    stable_s: float = 60.0


class EngineProcess:
    """An engine in its own process, for one event loop; every method is to be called there.

    A worker that dies or stalls is replaced. Requests that it had end with EngineDeadError, as do requests that come
    while none is ready.

    Args:
        model_path: a checkpoint directory.
        config: the engine's sizes.
        watchdog: when to give a worker up.
        report: is told (done, total) while programs compile.
        command: the worker's program; it is given the number of its socket.

    Attributes:
        state: "starting" until first ready; "restarting" between workers; "draining" in `stop`; "stopped" before
            `start`, after `stop`, and when restarting has been given up, which `failure` then explains.
        info: what the engine serves, once it has been ready.
        stats: the engine's latest figures, at most half a second old while it runs. All begin at 0 with every worker.
        restarts: workers that were replaced.
        failure: why there is no engine and will be none, or None.
    """

    def __init__(
        self,
        model_path: Path,
        config: EngineConfig,
        *,
        watchdog: Watchdog | None = None,
        report: Callable[[int, int], None] | None = None,
        command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self.state: State = "stopped"
        self.info: ModelInfo | None = None
        self.stats = EngineStats()
        self.restarts = 0
        self.failure: str | None = None
        self._model_path = model_path
        self._config = config
        self._watchdog = watchdog or Watchdog()
        self._report = report
        self._command = command
        self._worker: WorkerProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._serials = itertools.count(1)
        self._streams: dict[str, OutputStream] = {}  # what the worker is at, by the id that the worker knows
        self._worker_ids: dict[str, str] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._progress_at = 0.0

    @property
    def healthy(self) -> bool:
        """Whether the engine is alive and making progress."""
        return self.state in ("ready", "draining")

    @property
    def pid(self) -> int | None:
        """The worker's process id, if there is a worker."""
        return None if self._worker is None else self._worker.pid

    async def start(self) -> None:
        """Starts the worker and returns when it is ready. Cancelling stops it.

        Raises:
            CheckpointError, UnsupportedModelError, ConfigError, MemoryBudgetError: the engine cannot serve this model.
            EngineDeadError: it failed in another way, `Watchdog.max_starts` times.
        """
        if self._supervisor is not None:
            raise RuntimeError("The engine process has been started already.")
        self.state, self.failure = "starting", None
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(started), name="engine supervisor")
        try:
            await started
        except BaseException:
            await self.stop(0.0)
            raise

    async def stop(self, drain_s: float) -> None:
        """Takes no more requests, gives those in flight `drain_s` seconds to finish, and ends the worker.

        What has not finished then ends with EngineDeadError. A second call, or one before the engine is ready, does not
        wait. Does nothing when there is no worker.
        """
        if self.state == "ready":
            self.state = "draining"
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(drain_s):
                    await self._idle.wait()
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.wait([supervisor])
        worker, self._worker = self._worker, None
        self._end_requests("The server shut down before this request had finished.")
        if worker is not None:
            status = await worker.shutdown(_SHUTDOWN_S if self.state == "draining" else 0.0)
            if self.state == "draining" and status != 0:
                logger.warning("The engine's process did not end cleanly: its exit status is %s.", status)
        self.state = "stopped"

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        interval_s: Callable[[], float] | None = None,
    ) -> AsyncGenerator[EngineOutput, None]:
        """The outputs of one request, until all its completions have finished or `abort` ends it.

        Increments that the caller was too slow for come merged. Closing the generator, or cancelling what waits for
        it, drops the request in the engine.

        Args:
            request_id: unique among the requests in flight; stands in the outputs.
            prompt_token_ids, params, priority, cache_salt: as `Engine.add` takes them.
            interval_s: says the shortest time to the next output; see `OutputStream`.

        Raises:
            RequestError: the request cannot be served as it is.
            OverloadedError: too many requests wait already.
            EngineDeadError: there is no engine, or it failed before the request had finished.
        """
        stream = OutputStream(request_id, params.n, interval_s)
        worker_id = self._admit(stream, prompt_token_ids, params, priority, cache_salt)
        try:
            while (output := await stream.get()) is not None:
                yield output
        finally:
            self._abort(worker_id)

    def abort(self, request_id: str) -> None:
        """Drops a request; its generator ends. Unknown and finished ids are ignored."""
        worker_id = self._worker_ids.get(request_id)
        if worker_id is not None:
            self._abort(worker_id)

    # --- requests --------------------------------------------------------------------------------------------------

    def _admit(
        self, stream: OutputStream, prompt: Sequence[int], params: SamplingParams, priority: int, cache_salt: str | None
    ) -> str:
        """Sends a request to the worker and returns the id that the worker knows it by."""
        worker = self._worker
        if self.state != "ready" or worker is None:
            now = "gone" if self.failure else self.state
            raise EngineDeadError(f"The engine is {now} and takes no requests. Send this one again later.")
        if stream.request_id in self._worker_ids:
            raise RequestError(f"The request id {stream.request_id!r} is in use.", param="request_id")
        room = self._config.max_waiting + self._config.max_num_seqs
        if len(self._streams) >= room or worker.unsent_bytes > MAX_UNSENT_BYTES:
            raise OverloadedError(f"{len(self._streams)} requests wait already. Try again later.", retry_after_s=1.0)
        worker_id = str(next(self._serials))
        try:
            worker.send(Add(worker_id, list(prompt), params, priority, cache_salt))
        except (OverflowError, UnicodeEncodeError) as error:
            raise RequestError(f"The request holds a number or a text that cannot be represented: {error}.") from error
        if not self._streams:
            self._progress_at = time.monotonic()
            self._idle.clear()
        self._streams[worker_id] = stream
        self._worker_ids[stream.request_id] = worker_id
        return worker_id

    def _forget(self, worker_id: str) -> OutputStream | None:
        """Takes a request off the books of what the worker is at."""
        stream = self._streams.pop(worker_id, None)
        if stream is not None:
            del self._worker_ids[stream.request_id]
            if not self._streams:
                self._idle.set()
        return stream

    def _abort(self, worker_id: str) -> None:
        stream = self._forget(worker_id)
        if stream is not None:
            stream.drop()
            if self._worker is not None:
                self._worker.send(Abort([worker_id]))

    def _end_requests(self, message: str) -> None:
        for worker_id in list(self._streams):
            stream = self._forget(worker_id)
            if stream is not None:
                stream.close(EngineDeadError(message))

    def _receive(self, report: Report) -> None:
        match report:
            case Step():
                self._progress_at = time.monotonic()
                for output in report.outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is not None and stream.put(output):
                        self._forget(output.request_id)
            case Heartbeat():
                if report.stats.steps != self.stats.steps:
                    self._progress_at = time.monotonic()
                self.stats = report.stats
            case Rejected():
                stream = self._forget(report.request_id)
                if stream is not None:
                    stream.close(report.error())
            case Starting():
                if self._report is not None:
                    self._report(report.done, report.total)
            case _:
                pass  # the worker's own life is the supervisor's business

    # --- supervision -----------------------------------------------------------------------------------------------

    async def _supervise(self, started: asyncio.Future[None]) -> None:
        """Keeps a worker running until cancelled; gives up where there is no hope."""
        try:
            error = await self._run_workers(started)
        except Exception as defect:
            logger.exception("The watch over the engine ends because of an error that it must not have.")
            error = EngineDeadError(f"The engine is not watched any more because of a {type(defect).__name__}.")
        if error is None:
            return
        self.state, self.failure = "stopped", str(error)
        if self._worker is not None:
            self._end_requests("The engine failed with this request in flight. Send the request again later.")
            await self._worker.kill()
            self._worker = None
        if started.done():
            logger.error("%s No more starts are tried.", error)
        else:
            started.set_exception(error)

    async def _run_workers(self, started: asyncio.Future[None]) -> TenfoldError | None:
        """Runs one worker after another. Returns why no more are tried, None when the server shuts down anyway."""
        watchdog = self._watchdog
        failed_starts = row = 0
        while True:
            life = await self._run_worker(started)
            if self.state == "draining":
                return None
            if life.refusal is not None and not started.done():
                return life.refusal
            failed_starts = failed_starts + 1 if life.served_s is None else 0
            if failed_starts >= watchdog.max_starts:
                times = f" {failed_starts} times in a row" if failed_starts > 1 else ""
                return EngineDeadError(f"The engine failed to start{times}: {life.reason}.")
            row = 1 if (life.served_s or 0.0) > watchdog.stable_s else row + 1
            delay_s = 0.0 if row == 1 else min(watchdog.max_backoff_s, watchdog.backoff_s * 2.0 ** min(row - 2, 16))
            logger.error("The engine failed: %s. It starts again in %.1f s.", life.reason, delay_s)
            await asyncio.sleep(delay_s)
            self.restarts += 1

    async def _run_worker(self, started: asyncio.Future[None]) -> "_Life":
        """One worker from its start to its end."""
        try:
            worker = self._worker = await WorkerProcess.spawn(self._command, self._receive)
        except OSError as error:
            return _Life(reason=f"its process could not be started ({error})")
        worker.send(Launch(str(self._model_path), self._config, logger.getEffectiveLevel()))
        complaint = await self._watch_start(worker)
        info = worker.started.result() if worker.started.done() else None
        ready_at = time.monotonic()
        if info is not None:
            self._note_ready(info, started)
            complaint = await self._watch(worker, info)
        if self.state == "ready":
            self.state = "restarting"
        reason = complaint or await worker.describe_end()
        self._end_requests("The engine failed with this request in flight and is restarted. Send the request again.")
        if complaint:
            await worker.log_stacks()
        await worker.kill()
        self._worker, self.stats = None, EngineStats()
        if info is None:
            return _Life(reason=reason, refusal=_refusal(worker.fatal))
        return _Life(reason=reason, served_s=time.monotonic() - ready_at)

    def _note_ready(self, info: ModelInfo, started: asyncio.Future[None]) -> None:
        self.info, self.state = info, "ready"
        logger.info("The engine is ready: %s in %s on %s.", info.architecture, info.dtype, info.device)
        if not started.done():
            started.set_result(None)

    async def _watch_start(self, worker: WorkerProcess) -> str | None:
        """Waits until the worker is ready or has ended; what is wrong with it if it is neither."""
        try:
            async with asyncio.timeout(self._watchdog.start_s):
                await asyncio.shield(worker.started)
        except TimeoutError:
            return f"it was not ready within {self._watchdog.start_s:.0f} s"
        return None

    async def _watch(self, worker: WorkerProcess, info: ModelInfo) -> str | None:
        """Waits until the worker has ended, or has stalled, which is what is wrong with it then."""
        limit_s = max(self._watchdog.stall_s, STALL_STEPS * info.longest_step_s)
        checked_at = time.monotonic()
        while not worker.closed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await worker.closed.wait()
            now = time.monotonic()
            if now - checked_at > 4 * _TICK_S:  # this process stood still itself: silence proves nothing
                worker.heard_at = self._progress_at = now
            checked_at = now
            if now - worker.heard_at > limit_s:
                return f"it gave no sign of life for {now - worker.heard_at:.1f} s"
            if self._streams and now - self._progress_at > limit_s:
                return f"it had work and made no progress for {now - self._progress_at:.1f} s"
        return None


@dataclass(frozen=True, kw_only=True)
class _Life:
    """How a worker ended.

    Attributes:
        reason: a phrase, as in "the engine failed: it ...".
        served_s: how long it had been ready; None if it never was.
        refusal: the error because of which it cannot serve this model as configured, now or later.
    """

    reason: str
    served_s: float | None = None
    refusal: TenfoldError | None = None


def _refusal(fatal: Fatal | None) -> TenfoldError | None:
    refused = None if fatal is None else _REFUSALS.get(fatal.error)
    return None if fatal is None or refused is None else refused(fatal.message)
