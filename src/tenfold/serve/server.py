"""The server's life: listen, start the engine, serve, drain, stop."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import uvicorn

from tenfold.base.errors import ConfigError
from tenfold.serve.app import build_app
from tenfold.serve.state import ServerState

BACKLOG = 2048
_CLOSE_S = 5  # for the last bytes to reach clients, once everything has been answered


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """How HTTP is spoken; names are vLLM's and uvicorn's.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        root_path: prefix of all addresses behind a proxy.
        ssl_keyfile, ssl_certfile: for HTTPS.
        access_log: log every request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    access_log: bool = True


def listen(options: HttpOptions) -> socket.socket:
    """A listening socket, before anything slow happens, so that a port in use is found out at once.

    Raises:
        ConfigError: the address cannot be used.
    """
    if not 0 <= options.port <= 65535:
        raise ConfigError(f"port {options.port} does not exist; ports go from 0 to 65535.")
    try:
        found = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV
        )
        family, _, _, _, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {options.host}:{options.port}: {error}. Choose another with --host and --port."
        ) from error


def serve(
    make_state: Callable[[], ServerState],
    options: HttpOptions,
    listener: socket.socket,
    announce: Callable[[], None],
) -> None:
    """Serve until SIGINT or SIGTERM, then finish what is in flight and return. A second signal cuts that short.

    Args:
        make_state: called in the event loop.
        options: how HTTP is spoken.
        listener: from `listen`; closed at the end.
        announce: called once requests are taken in.

    Raises:
        TenfoldError: the engine cannot start.
    """
    config = uvicorn.Config(
        "tenfold",  # replaced by the application below, which needs the loop that this configuration makes
        root_path=options.root_path,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        access_log=options.access_log,
        log_config=None,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_S,
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(_serve(make_state(), config, listener, announce))


async def _serve(
    state: ServerState, config: uvicorn.Config, listener: socket.socket, announce: Callable[[], None]
) -> None:
    config.app = build_app(state)
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(state.engine.start())
    stopping = asyncio.create_task(server.stop_requested.wait())
    try:
        await asyncio.wait((serving, starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            announce()
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            await _drain(state, server)
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.wait((starting,))
        await state.engine.stop(0.0)
        server.should_exit = True
        await serving
        state.close()


async def _drain(state: ServerState, server: "_Server") -> None:
    """Lets requests in flight finish, unless their time or the user's patience is over."""
    draining = asyncio.create_task(state.drain())
    hurrying = asyncio.create_task(server.hurry_requested.wait())
    await asyncio.wait((draining, hurrying), return_when=asyncio.FIRST_COMPLETED)
    draining.cancel()
    hurrying.cancel()


class _Server(uvicorn.Server):
    """uvicorn, except that a signal does not stop it: new requests are refused while those in flight finish."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._loop = asyncio.get_running_loop()
        self.stop_requested = asyncio.Event()
        self.hurry_requested = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again = self.stop_requested.is_set()
        event = self.hurry_requested if again else self.stop_requested
        self._loop.call_soon_threadsafe(event.set)
