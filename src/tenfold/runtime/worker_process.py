"""One life of the engine's process, from outside: its start, the messages either way, its end."""

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from tenfold.engine.outputs import ModelInfo
from tenfold.runtime.messages import Command, Fatal, Ready, Report, Shutdown, encode, read_reports

WORKER_COMMAND = (sys.executable, "-P", "-m", "tenfold.runtime.worker")

_REAP_S = 10.0
_POLL_S = 0.01
_STACKS_S = 0.2
_REPORT_S = 0.5

logger = logging.getLogger(__name__)


class WorkerProcess(asyncio.Protocol):
    """A worker and the connection to it. Made by `spawn`; ended by `shutdown` or `kill`, each of which reaps it.

    Attributes:
        started: what the worker serves once it is ready, or None if it ended before.
        closed: set when the connection has ended, and with it every hope of a message.
        heard_at: when the last message came (`time.monotonic`).
        fatal: the worker's own account of its end, if it gave one.
    """

    def __init__(self, process: subprocess.Popen[bytes], receive: Callable[[Report], None]) -> None:
        self.started: asyncio.Future[ModelInfo | None] = asyncio.get_running_loop().create_future()
        self.closed = asyncio.Event()
        self.heard_at = time.monotonic()
        self.fatal: Fatal | None = None
        self._process = process
        self._receive = receive
        self._reader = read_reports()
        self._transport: asyncio.WriteTransport | None = None

    @classmethod
    async def spawn(cls, command: Sequence[str], receive: Callable[[Report], None]) -> "WorkerProcess":
        """Starts a worker; `receive` gets each of its messages, on this event loop.

        Args:
            command: the program; the number of its end of the socket pair is added to it.
            receive: called with every message, those that set `started` and `fatal` included.

        Raises:
            OSError: the program cannot be started.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = _start(command, theirs)
        except BaseException:
            ours.close()
            raise
        worker = cls(process, receive)
        try:
            ours.setblocking(False)
            await asyncio.get_running_loop().create_unix_connection(lambda: worker, sock=ours)
        except BaseException:
            ours.close()
            process.kill()
            process.wait()
            raise
        return worker

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def unsent_bytes(self) -> int:
        """What the worker has not read yet, beyond what the socket holds."""
        return 0 if self._transport is None else self._transport.get_write_buffer_size()

    def send(self, command: Command) -> None:
        """Sends without waiting; nothing happens when the connection has ended.

        Raises:
            OverflowError, UnicodeEncodeError: the command cannot be written as a message.
        """
        frame = encode(command)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    async def shutdown(self, grace_s: float) -> int | None:
        """Asks the worker to end, and kills it after `grace_s` seconds. Returns the exit status, None if it hung."""
        self.send(Shutdown())
        await self._wait(grace_s)
        return await self.kill()

    async def kill(self) -> int | None:
        """Ends the worker at once if it still runs. Returns the exit status, negative for a signal.

        None means that even SIGKILL has not ended it, as when the operating system waits for a broken device.
        """
        if self._process.poll() is None:
            self._process.kill()
        status = await self._wait(_REAP_S)
        if status is None:
            logger.error("The engine's process %d cannot be killed; it may hold its device and memory.", self.pid)
        if self._transport is not None:
            self._transport.abort()
        return status

    async def log_stacks(self) -> None:
        """Has a worker that hangs print where, if it still can."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(_STACKS_S)

    async def describe_end(self) -> str:
        """Why the connection ended, as a phrase about the engine."""
        status = await self._wait(_REPORT_S)
        if self.fatal is not None:
            return f"it stopped because of {self.fatal.error}: {self.fatal.message}"
        if status is None:
            return "it closed its connection"
        if status < 0:
            return f"its process was killed by {signal.Signals(-status).name}"
        return f"its process ended with status {status}"

    async def _wait(self, timeout_s: float) -> int | None:
        for _ in range(int(timeout_s / _POLL_S)):
            if self._process.poll() is not None:
                break
            await asyncio.sleep(_POLL_S)
        return self._process.poll()

    # --- asyncio.Protocol ------------------------------------------------------------------------------------------

    def connection_made(self, transport: object) -> None:  # uvloop's share no base class with asyncio's
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        self.heard_at = time.monotonic()
        try:
            reports = self._reader.feed(data)
        except msgspec.MsgspecError:
            logger.exception("What the engine's process sent cannot be read.")
            self._process.kill()
            return
        for report in reports:
            if isinstance(report, Ready) and not self.started.done():
                self.started.set_result(report.info)
            elif isinstance(report, Fatal):
                self.fatal = report
            self._receive(report)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.started.done():
            self.started.set_result(None)
        self.closed.set()


def _start(command: Sequence[str], theirs: socket.socket) -> subprocess.Popen[bytes]:
    """Starts the program with the socket, with its output on our standard error.

    It gets a process group of its own, so that Ctrl-C in a terminal reaches the server alone, which then drains.
    """
    return subprocess.Popen(
        [*command, str(theirs.fileno())],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        stdout=2,
        process_group=0,
    )
