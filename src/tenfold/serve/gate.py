"""What every request passes before its endpoint: the API key, and the bound on requests in the server."""

import hashlib
import hmac

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from tenfold.base.errors import TenfoldError
from tenfold.serve.errors import HttpError, error_response
from tenfold.serve.state import ServerState

OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/version", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
"""Addresses that need no key: what load balancers, Prometheus and people read."""


class Gate:
    """ASGI middleware: 401 without a valid key, 429 when the server is full, 503 when it shuts down.

    Only POST requests count and can be refused for load: they are the ones that make work.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state
        self._keys = [_digest(key) for key in state.config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            self._authenticate(HTTPConnection(scope))
            if scope["method"] == "POST":
                self._state.enter()
        except TenfoldError as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["method"] == "POST":
                self._state.leave()

    def _authenticate(self, connection: HTTPConnection) -> None:
        if not self._keys:
            return
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip())
        # Every key is compared, each in constant time, so that nothing can be learned from how long it takes.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise HttpError(
                401,
                "a valid API key is needed; send it in the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
