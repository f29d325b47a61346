"""Response bodies as the OpenAPI document describes them. Only documentation: responses are not built from these."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Described(BaseModel):
    """A JSON object that has no fields beyond those described."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(Described):
    """What is wrong and what to change; `param` is the path of the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Described):
    """Every error's body."""

    error: ErrorDetail


class PromptTokensDetails(Described):
    """Prompt tokens that were found in the prefix cache."""

    cached_tokens: int


class UsageInfo(Described):
    """Tokens of the request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class RankedLogprob(Described):
    """A token in `prompt_logprobs`."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RankedLogprob] | None]
FinishReason = Literal["stop", "length", "abort"]


class CompletionLogprobs(Described):
    """One item per token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Described):
    """One completion of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Described):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageInfo


class TopLogprob(Described):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Described):
    """One item per token of the answer."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(Described):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Described):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None


class ChatCompletion(Described):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageInfo
    prompt_logprobs: PromptLogprobs | None = None


class ModelCard(Described):
    """A served model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelList(Described):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeResponse(Described):
    """Answer of /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(Described):
    """Answer of /detokenize."""

    prompt: str


class VersionResponse(Described):
    """Answer of /version."""

    version: str


class StatusResponse(Described):
    """Answer of /health and /ready when all is well."""

    status: str = Field(examples=["ok"])


def documented(model: type[BaseModel], *, streams: bool = False, errors: tuple[int, ...] = ()) -> dict[int | str, Any]:
    """FastAPI's `responses` of an endpoint: its answer, perhaps also as server-sent events, and its errors."""
    answer: dict[str, Any] = {"model": model, "description": "The answer."}
    if streams:
        answer["content"] = {"text/event-stream": {}}  # OpenAPI 3.1 has no words for the schema of an event
    described: dict[int | str, Any] = {200: answer}
    for status in errors:
        described[status] = {"model": ErrorResponse, "description": _ERRORS[status]}
    return described


_ERRORS = {
    400: "The request is wrong; the message says how.",
    401: "No valid API key.",
    404: "There is no such model.",
    413: "The body is too long.",
    415: "The body is not declared as JSON.",
    429: "Too many requests; retry after the time in the Retry-After header.",
    503: "The engine is not ready, or died; retry after the time in the Retry-After header.",
}
