"""The application: every address, what it answers, and the OpenAPI document that says so."""

import importlib.metadata
import time
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic.json_schema import models_json_schema

from tenfold.serve.chat import create_chat_completion
from tenfold.serve.completions import create_completion
from tenfold.serve.errors import error_handlers, unavailable
from tenfold.serve.gate import OPEN_PATHS, Gate
from tenfold.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestModel,
    TokenizeRequest,
)
from tenfold.serve.responses import (
    ChatCompletion,
    Completion,
    DetokenizeResponse,
    ModelCard,
    ModelList,
    StatusResponse,
    TokenizeResponse,
    VersionResponse,
    documented,
)
from tenfold.serve.state import ServerState
from tenfold.serve.tokenization import detokenize, tokenize

COMPLETIONS, CHAT_COMPLETIONS = "/v1/completions", "/v1/chat/completions"
GENERATING = (COMPLETIONS, CHAT_COMPLETIONS)
"""The addresses that a language model answers."""

_REFERENCE = "#/components/schemas/{model}"
_BODIES: tuple[type[RequestModel], ...] = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)
_POST_ERRORS = (400, 401, 404, 413, 415, 429, 503)


def build_app(state: ServerState) -> FastAPI:
    """The ASGI application over a server's state. The caller starts and stops the engine."""
    version = importlib.metadata.version("tenfold")
    app = FastAPI(
        title="Tenfold",
        version=version,
        description="An OpenAI-compatible server.",
        redoc_url=None,
        exception_handlers=error_handlers(),
    )
    _add_openai_routes(app, state)
    _add_text_routes(app, state)
    _add_status_routes(app, state, version)
    app.add_middleware(Gate, state=state)
    app.openapi = lambda: _describe(app, state)
    return app


def _add_openai_routes(app: FastAPI, state: ServerState) -> None:
    created = int(time.time())

    @app.post(
        COMPLETIONS,
        responses=documented(Completion, streams=True, errors=_POST_ERRORS),
        openapi_extra=_body(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        return await create_completion(state, request)

    @app.post(
        CHAT_COMPLETIONS,
        responses=documented(ChatCompletion, streams=True, errors=_POST_ERRORS),
        openapi_extra=_body(ChatRequest),
    )
    async def chat_completions(request: Request) -> Response:
        return await create_chat_completion(state, request)

    @app.get("/v1/models", responses=documented(ModelList, errors=(401,)))
    async def models() -> Response:
        cards = [_model_card(state, name, created) for name in state.config.model_names]
        return _json({"object": "list", "data": cards})

    @app.get("/v1/models/{model_id:path}", responses=documented(ModelCard, errors=(401, 404)))
    async def model(model_id: str) -> Response:
        state.require_model(model_id)
        return _json(_model_card(state, model_id, created))


def _add_text_routes(app: FastAPI, state: ServerState) -> None:
    @app.post(
        "/tokenize", responses=documented(TokenizeResponse, errors=_POST_ERRORS), openapi_extra=_body(TokenizeRequest)
    )
    async def tokens(request: Request) -> Response:
        return await tokenize(state, request)

    @app.post(
        "/detokenize",
        responses=documented(DetokenizeResponse, errors=_POST_ERRORS),
        openapi_extra=_body(DetokenizeRequest),
    )
    async def text(request: Request) -> Response:
        return await detokenize(state, request)


def _add_status_routes(app: FastAPI, state: ServerState, version: str) -> None:
    @app.get("/health", responses=documented(StatusResponse, errors=(503,)))
    async def health() -> Response:
        """Whether the engine is alive and making progress."""
        if not state.engine.healthy:
            raise unavailable(f"the engine is not healthy; it is {state.engine.failure or state.engine.state}")
        return _json({"status": "ok"})

    @app.get("/ready", responses=documented(StatusResponse, errors=(503,)))
    async def ready() -> Response:
        """Whether requests are taken in."""
        state.require_ready()
        return _json({"status": "ok"})

    @app.get("/version", responses=documented(VersionResponse))
    async def show_version() -> Response:
        return _json({"version": version})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _model_card(state: ServerState, name: str, created: int) -> dict[str, Any]:
    info = state.engine.info
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "tenfold",
        "root": state.config.model_names[0],
        "parent": None,
        "max_model_len": None if info is None else info.max_model_len,
    }


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _body(model: type[RequestModel]) -> dict[str, Any]:
    """The part of an operation's description that says what its body is."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe(app: FastAPI, state: ServerState) -> dict[str, Any]:
    """The OpenAPI document, made once: FastAPI's own, with the bodies that the endpoints read by themselves."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, bodies = models_json_schema([(model, "validation") for model in _BODIES], ref_template=_REFERENCE)
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(bodies["$defs"])
        for unused in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(unused, None)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's; ours is a 400
                if state.config.api_keys and path not in OPEN_PATHS:
                    operation["security"] = [{"key": []}]
        if state.config.api_keys:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        app.openapi_schema = document
    return app.openapi_schema
