"""Errors as OpenAI's clients expect them: a status, and a body with message, type, param and code."""

import http
import logging
import math
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tenfold.base.errors import (
    EngineDeadError,
    OverloadedError,
    RequestError,
    TenfoldError,
    TokenizerError,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 5

INVALID = "invalid_request_error"
SERVER = "server_error"
OVERLOADED = "rate_limit_error"


class HttpError(TenfoldError):
    """A refusal with a status of its own.

    Attributes:
        status: of the response.
        kind: OpenAI's error type.
        param, code: the field at fault and a machine-readable reason, or None.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}


def unavailable(message: str) -> HttpError:
    """503: the server cannot answer now and will be able to, soon or elsewhere."""
    return HttpError(503, message, kind=SERVER, code="unavailable", headers={"retry-after": str(RETRY_AFTER_S)})


def as_http_error(error: Exception) -> HttpError:
    """What the client is told of an error. Of one that is not deliberate it learns nothing."""
    match error:
        case HttpError():
            return error
        case RequestError():
            return HttpError(400, str(error), param=error.param, code=error.code)
        case TokenizerError():
            return HttpError(400, str(error))
        case OverloadedError():
            seconds = max(1, math.ceil(error.retry_after_s))
            return HttpError(429, str(error), kind=OVERLOADED, code="overloaded", headers={"retry-after": str(seconds)})
        case EngineDeadError():
            headers = {"retry-after": str(RETRY_AFTER_S)}
            return HttpError(503, str(error), kind=SERVER, code="engine_dead", headers=headers)
        case HTTPException():
            return HttpError(error.status_code, _http_message(error), headers=dict(error.headers or {}))
        case _:
            return HttpError(500, "internal server error; the server's log has the details", kind=SERVER)


def error_body(error: HttpError) -> bytes:
    """The JSON body of an error."""
    fields = {"message": str(error), "type": error.kind, "param": error.param, "code": error.code}
    return orjson.dumps({"error": fields})


def error_response(error: Exception) -> Response:
    """The response for an error."""
    shown = as_http_error(error)
    return Response(error_body(shown), status_code=shown.status, headers=shown.headers, media_type="application/json")


async def handle_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for everything that a route raises."""
    if request.method == "HEAD":
        shown = as_http_error(error)
        return Response(status_code=shown.status, headers=shown.headers)
    return error_response(error)


def error_handlers() -> dict[Any, Any]:
    """For FastAPI: deliberate errors, Starlette's own (404, 405), and everything else (500)."""
    return {TenfoldError: handle_error, HTTPException: handle_error, Exception: handle_error}


def _http_message(error: HTTPException) -> str:
    match error.status_code:
        case 404:
            return "there is nothing at this address; /docs lists what there is"
        case 405:
            allowed = (error.headers or {}).get("Allow") or (error.headers or {}).get("allow", "")
            return f"this address does not take that method; it takes {allowed}"
        case status:
            return error.detail or http.HTTPStatus(status).phrase
