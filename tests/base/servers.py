"""Small stand-ins for S3 and for the Hugging Face hub, spoken to by the real clients over a real socket."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import Queue
from threading import Event, Thread
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest


class Server:
    """Serves named bytes and counts what was asked for.

    Attributes:
        files: content by path.
        requests: the method, path and Range header of every request.
        break_after: the number of file requests after which the server fails; None never.
        status: answers every request with this status and these headers instead, if not None.
        held: regular expression of paths that are not written before `release` is set; None holds none.
        holding: paths that are being held.
        denied: nothing may be written.
        once: paths of objects that are gone when they were read.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.break_after: int | None = None
        self.status: tuple[int, dict[str, str]] | None = None
        self.held: str | None = None
        self.holding: Queue[str] = Queue()
        self.release = Event()
        self.denied = False
        self.once: set[str] = set()
        self.url = ""

    def downloads(self) -> list[str]:
        return [path for method, path, _ in self.requests if method == "GET" and path in self.files]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: ClassVar[Server]

    def handle(self) -> None:
        with suppress(ConnectionResetError):  # by a client that was killed
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, content: bytes, headers: dict[str, str]) -> None:
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes", "Last-Modified": "Sat, 01 Nov 2025 10:00:00 GMT"} | headers
        if self.headers.get("If-Match", etag) != etag:
            self.answer(412)
            return
        span = self.headers.get("Range")
        if span is None:
            self.answer(200, content, headers)
            return
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(206, content[start:stop], headers)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state = self.server_state
        url = urlsplit(self.path)
        path = unquote(url.path)
        state.requests.append((self.command, path, self.headers.get("Range")))
        if state.status is not None:
            self.answer(state.status[0], headers=state.status[1])
        elif state.break_after is not None and path in state.files and len(state.downloads()) > state.break_after:
            self.answer(403)
        else:
            self.route(path, {key: values[0] for key, values in parse_qs(url.query).items()})

    def route(self, path: str, query: dict[str, str]) -> None:
        raise NotImplementedError


class S3Handler(Handler):
    """ListObjectsV2 and GetObject with ranges and If-Match; paths are /bucket/key."""

    def route(self, path: str, query: dict[str, str]) -> None:
        files = self.server_state.files
        if "list-type" not in query:
            content = files.get(path)
            if path in self.server_state.once and self.command == "GET":
                files.pop(path, None)
            self.answer(404) if content is None else self.send_file(content, {})
            return
        bucket = f"/{path.strip('/')}/"
        keys = [
            name.removeprefix(bucket) for name in sorted(files) if name.startswith(bucket + query.get("prefix", ""))
        ]
        flat = "delimiter" in query
        here = [key for key in keys if not flat or "/" not in key.removeprefix(query.get("prefix", ""))]
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(files[bucket + key])}</Size>"
            f"<ETag>&quot;{hashlib.md5(files[bucket + key]).hexdigest()}&quot;</ETag>"
            f"<LastModified>2025-11-01T10:00:00.000Z</LastModified></Contents>"
            for key in here
        )
        self.answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode())


class WritableS3Handler(S3Handler):
    """S3 that takes and forgets objects, too."""

    def do_PUT(self) -> None:
        state, path = self.server_state, unquote(urlsplit(self.path).path)
        state.requests.append((self.command, path, None))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if state.held is not None and re.search(state.held, path):
            state.holding.put(path)
            state.release.wait()
            self.close_connection = True  # the client is dead by then
            return
        if state.denied:
            self.answer(403)
            return
        state.files[path] = body
        self.answer(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def do_POST(self) -> None:
        """DeleteObjects."""
        url = urlsplit(self.path)
        assert url.query == "delete"
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = re.findall("<Key>(.*?)</Key>", body)
        for key in keys:
            self.server_state.files.pop(f"/{url.path.strip('/')}/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self.answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())


class HubHandler(Handler):
    """The hub's endpoints that a snapshot needs; paths are /owner/name/file, all at one commit."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def route(self, path: str, query: dict[str, str]) -> None:
        files = self.server_state.files
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            held = {
                name.removeprefix(f"/{repo}/"): body for name, body in files.items() if name.startswith(f"/{repo}/")
            }
            if not held:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif rest[-1] not in ("main", self.COMMIT):
                self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            elif rest[0] == "tree":
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                    for name, body in held.items()
                ]
                self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
            else:
                siblings = [{"rfilename": name} for name in held]
                info = {"id": repo, "modelId": repo, "sha": self.COMMIT, "siblings": siblings, "tags": []}
                self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
            return
        content = files.get("/" + "/".join([*parts[:2], *parts[4:]]))  # owner/name/resolve/commit/file
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self.send_file(content, {"X-Repo-Commit": self.COMMIT})


@contextmanager
def serving(handler: type[Handler]) -> Iterator[Server]:
    """Runs a server on a free port for the length of the block."""
    state = Server()
    bound = type(handler.__name__, (handler,), {"server_state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        server.daemon_threads = True
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def writable_s3(patch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An S3 that the environment names, for this process and those that it starts."""
    with serving(WritableS3Handler) as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        settings = {"ENDPOINT": server.url, "ALLOW_HTTP": "true", "REGION": "us-east-1"}
        for name, value in (settings | {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "secret"}).items():
            patch.setenv(f"AWS_{name}", value)
        yield server
        server.release.set()
