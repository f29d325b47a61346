"""Wires a server together: the model's files, its tokenizer, the engine's process, HTTP."""

import json
import logging
import shlex
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from tenfold.base import paths
from tenfold.base.adapter import base_files
from tenfold.base.builtin import BUILTIN_MODEL, builtin_model
from tenfold.base.files import TOKENIZER_FILES
from tenfold.base.storage import fetch
from tenfold.data import gguf_checkpoint
from tenfold.data.generation_config import read_sampling_defaults
from tenfold.data.tokenizer import Tokenizer
from tenfold.engine.config import EngineConfig
from tenfold.runtime.engine_process import EngineProcess
from tenfold.serve.config import ServerConfig
from tenfold.serve.server import HttpOptions, listen, serve
from tenfold.serve.state import ServerState

logger = logging.getLogger(__name__)

_QUESTION = "What does os.path.join do?"
_BEGINNING = "import os"


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model is served, and as what.

    Attributes:
        model: a directory, a GGUF file, a Hugging Face id or a URI; None is the built-in model.
        names: ids for requests; without any, what `model` says.
        tokenizer: where the tokenizer is, if not with the model.
        revision: of a Hugging Face id.
        chat_template: instead of the model's own.
        own_sampling: take defaults of sampling from the model's `generation_config.json`.
    """

    model: str | None
    names: tuple[str, ...]
    tokenizer: str | None
    revision: str | None
    chat_template: str | None
    own_sampling: bool


def configure_logging(level: str, http_level: str) -> None:
    """Log to standard error; of uvicorn, requests and trouble only."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("tenfold").setLevel(level.upper())
    logging.getLogger("uvicorn.access").setLevel(http_level.upper())


def serve_model(
    choice: ModelChoice,
    engine_config: EngineConfig,
    http: HttpOptions,
    *,
    api_keys: tuple[str, ...],
    max_request_bytes: int,
    shutdown_timeout_s: float,
) -> None:
    """Serve a model until a signal ends it.

    Args:
        choice, engine_config, http: the model, its engine, and how it is reached.
        api_keys: keys that clients must send, beside those of `paths.api_keys`.
        max_request_bytes, shutdown_timeout_s: as in `ServerConfig`.

    Raises:
        TenfoldError: an option is wrong, or the model cannot be served.
    """
    with listen(http) as listener:
        path, tokenizer_path = _find_files(choice)
        beside = base_files(path, progress=True)
        tokenizer = Tokenizer.load(tokenizer_path or beside.tokenizer, chat_template=choice.chat_template)
        config = ServerConfig(
            model_names=choice.names or (choice.model or BUILTIN_MODEL,),
            sampling_defaults=read_sampling_defaults(beside.model) if choice.own_sampling else {},
            api_keys=(*api_keys, *paths.api_keys()),
            max_request_bytes=max_request_bytes,
            max_pending=engine_config.max_waiting + engine_config.max_num_seqs,
            shutdown_timeout_s=shutdown_timeout_s,
        )
        with Progress(console=Console(stderr=True), transient=True) as progress:
            engine = EngineProcess(path, engine_config, report=_StartProgress(progress))

            def announce() -> None:
                progress.stop()
                chat = tokenizer.has_chat_template
                print(_greeting(_base_url(http, listener), config, chat=chat), flush=True)

            serve(lambda: ServerState(engine, tokenizer, config), http, listener, announce)


def _find_files(choice: ModelChoice) -> tuple[Path, Path | None]:
    """The directories of the model, and of its tokenizer if that is another one."""
    if choice.model is None:
        path = builtin_model()
    else:
        path = fetch(choice.model, revision=choice.revision, progress=True)
        path = gguf_checkpoint.prepare(path, tokenizer=choice.tokenizer is None)
    if choice.tokenizer is None:
        return path, None
    return path, gguf_checkpoint.prepare(fetch(choice.tokenizer, files=TOKENIZER_FILES))


class _StartProgress:
    """Shows how many programs the engine has compiled."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task("compiling", total=total)
        self._progress.update(self._task, completed=done, total=total)


def _base_url(http: HttpOptions, listener: socket.socket) -> str:
    """An address of the server for a client on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(http.host, http.host)
    scheme = "https" if http.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}{http.root_path}/v1"


def _greeting(base_url: str, config: ServerConfig, *, chat: bool) -> str:
    """One line of curl and three of Python that talk to the server."""
    model = config.model_names[0]
    body = {"messages": [{"role": "user", "content": _QUESTION}]} if chat else {"prompt": _BEGINNING}
    path, call, answer = (
        ("chat/completions", "chat.completions.create", "choices[0].message.content")
        if chat
        else ("completions", "completions.create", "choices[0].text")
    )
    key = "YOUR_API_KEY" if config.api_keys else "none"
    authorization = f" -H 'Authorization: Bearer {key}'" if config.api_keys else ""
    data = shlex.quote(json.dumps({"model": model} | body))
    arguments = ", ".join(f"{name}={value!r}" for name, value in ({"model": model} | body).items())
    return "\n".join(
        (
            f"curl {base_url}/{path} -H 'Content-Type: application/json'{authorization} -d {data}",
            "from openai import OpenAI",
            f"client = OpenAI(base_url={base_url!r}, api_key={key!r})",
            f"print(client.{call}({arguments}).{answer})",
        )
    )
