"""Reading a request's body, no further than allowed."""

from starlette.requests import Request

from tenfold.serve.errors import HttpError


async def read_body(request: Request, limit: int) -> bytes:
    """The bytes of a JSON request.

    Raises:
        HttpError: 415, it does not say that it is JSON; 413, it is longer than `limit` bytes; 400, it was cut off.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HttpError(415, f"send JSON, with the header Content-Type: application/json; this is {media_type!r:.100}")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and int(length[:20]) > limit:
        raise _too_long(limit)
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise HttpError(400, "the request's body was cut off")
        body += message.get("body", b"")
        if len(body) > limit:
            raise _too_long(limit)
        if not message.get("more_body", False):
            return bytes(body)


def _too_long(limit: int) -> HttpError:
    return HttpError(
        413,
        f"the request's body is longer than the {limit} bytes that this server takes; shorten it, or start the server "
        "with a larger --max-request-bytes",
        code="request_too_large",
        headers={"connection": "close"},  # or the client would have to be read to its end
    )
