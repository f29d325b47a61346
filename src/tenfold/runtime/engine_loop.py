"""The engine's process from the inside: apply what the server asks, step, and report, for as long as it is there.

No jax here: a worker brings its engine along, and tests bring a scripted one.
"""

import faulthandler
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from tenfold.base.errors import OverloadedError, RequestError, TenfoldError
from tenfold.engine.outputs import EngineOutput, EngineStats, ModelInfo
from tenfold.engine.sampling_params import SamplingParams
from tenfold.runtime.messages import (
    Abort,
    Add,
    Command,
    Fatal,
    Heartbeat,
    Launch,
    Ready,
    Rejected,
    Report,
    Starting,
    Step,
    encode,
    read_commands,
)

HEARTBEAT_S = 0.5
ORPHAN_GRACE_S = 2.0  # for the loop to end by itself once the server is gone
_RECEIVE_BYTES = 1 << 16

logger = logging.getLogger(__name__)


@runtime_checkable
class StepEngine(Protocol):
    """What the loop needs of an engine; `tenfold.engine.engine.Engine` says what each does."""

    @property
    def info(self) -> ModelInfo: ...
    @property
    def has_work(self) -> bool: ...
    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[EngineOutput]: ...
    def stats(self) -> EngineStats: ...
    def check_integrity(self) -> None: ...
    def close(self) -> None: ...


class CommandQueue:
    """The commands that have arrived, read off the socket by a thread of its own.

    The thread keeps the socket empty while a step runs, and sees the server go even while the engine loads or hangs:
    the loop then has `ORPHAN_GRACE_S` to end before the process is ended under it. The queue needs no bound, because
    the server admits no more requests than the engine may hold.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def get(self, timeout_s: float | None = None) -> Command | None:
        """The next command, or None once the server is gone. Waits without limit if `timeout_s` is None.

        Raises:
            queue.Empty: there was none within `timeout_s` seconds.
        """
        if timeout_s is not None and timeout_s <= 0:
            return self._queue.get_nowait()
        return self._queue.get(timeout=timeout_s)

    def empty(self) -> bool:
        """Whether `get` would have to wait."""
        return self._queue.empty()

    def _read(self) -> None:
        try:
            reader = read_commands()
            while data := self._connection.recv(_RECEIVE_BYTES):
                for command in reader.feed(data):
                    self._queue.put(command)
        except OSError:
            pass  # reset: the server was killed
        except Exception:
            logger.exception("What the server sent cannot be read; the engine stops.")
        self._queue.put(None)
        time.sleep(ORPHAN_GRACE_S)
        os._exit(1)  # neither a load nor a hung step can be interrupted in any other way


class EngineLoop:
    """Serves one engine to the other end of a connection, all from the calling thread."""

    def __init__(self, engine: StepEngine, connection: socket.socket, commands: CommandQueue) -> None:
        self._engine = engine
        self._connection = connection
        self._commands = commands

    def run(self) -> None:
        """Steps while there is work and waits while there is none, until the server says Shutdown or is gone."""
        engine = self._engine
        beat_due = 0.0
        while True:
            busy = engine.has_work
            if not self._apply_commands(0.0 if busy else beat_due - time.monotonic()):
                return
            if engine.has_work:
                outputs = engine.step()
                if outputs:
                    self._send(Step(outputs))
            now = time.monotonic()
            if now >= beat_due or (busy and not engine.has_work):  # the figures are final when the work ends
                self._send(Heartbeat(engine.stats()))
                beat_due = now + HEARTBEAT_S

    def _apply_commands(self, wait_s: float) -> bool:
        """Applies all commands that are there, waiting for the first for at most `wait_s`; False when it is over."""
        try:
            command = self._commands.get(wait_s)
            while self._apply(command):
                if self._commands.empty():
                    return True
                command = self._commands.get(0.0)
        except queue.Empty:
            return True
        return False

    def _apply(self, command: Command | None) -> bool:
        match command:
            case Add():
                self._add(command)
            case Abort():
                for request_id in command.request_ids:
                    self._engine.abort(request_id)
            case _:
                return False
        return True

    def _add(self, request: Add) -> None:
        try:
            self._engine.add(
                request.request_id,
                request.prompt_token_ids,
                request.params,
                priority=request.priority,
                cache_salt=request.cache_salt,
            )
        except RequestError as error:
            self._send(Rejected(request.request_id, str(error), param=error.param, code=error.code))
        except OverloadedError as error:
            self._send(Rejected(request.request_id, str(error), retry_after_s=error.retry_after_s))

    def _send(self, report: Report) -> None:
        self._connection.sendall(encode(report))


def run_worker(connection: socket.socket, load: Callable[[Launch, Callable[[int, int], None]], StepEngine]) -> int:
    """The whole life of a worker: load the engine that the server asks for, serve it, close it.

    Only the server ends it, by a message or by going away. Signals meant for the whole program, such as Ctrl-C or a
    service manager's SIGTERM, are ignored, because the server answers them by draining first.

    Args:
        connection: the worker's end of the socket pair.
        load: makes the engine, telling its second argument (done, total) meanwhile. A TenfoldError that it raises
            reaches whoever starts the engine as it is.

    Returns:
        The exit status. 1 after an error, which the log has in full.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # a watchdog asks so where a stalled engine stands
    commands = CommandQueue(connection)
    launch = commands.get()
    if not isinstance(launch, Launch):
        return 0
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("tenfold").setLevel(launch.log_level)
    try:
        engine = load(launch, lambda done, total: connection.sendall(encode(Starting(done, total))))
    except TenfoldError as error:
        return _give_up(connection, error)
    except Exception as error:
        logger.exception("The engine cannot start.")
        return _give_up(connection, error)
    try:
        connection.sendall(encode(Ready(engine.info)))
        EngineLoop(engine, connection, commands).run()
        engine.check_integrity()
        engine.close()
    except ConnectionError:
        return 0
    except Exception as error:
        logger.exception("The engine stops because of an error that it must not have.")
        return _give_up(connection, error)
    return 0


def _give_up(connection: socket.socket, error: Exception) -> int:
    try:
        connection.sendall(encode(Fatal(type(error).__name__, str(error))))
    except (OSError, UnicodeEncodeError):
        logger.warning("The server does not hear why the engine stops.")
    return 1
