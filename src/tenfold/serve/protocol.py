"""Request bodies: the OpenAI API's fields, the extras that vLLM's users know, and what becomes of all others.

Nothing is ignored in silence. A field is either used; or listed in `HARMLESS`, because leaving it out cannot change the
answer; or listed in `UNSUPPORTED`, and then only a value that asks for nothing passes. All others are refused by name.
"""

from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tenfold.base.errors import RequestError
from tenfold.engine.sampling_params import MAX_LOGPROBS, MAX_N
from tenfold.serve.fields import Biases, Content, Count, Int32, Prompts, Stops, TokenId

MAX_COMPLETION_LOGPROBS = 5

HARMLESS = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
    "include_reasoning",
)
"""Fields that are accepted and not used: they concern OpenAI's own accounts, or are hints."""

UNSUPPORTED: dict[str, tuple[str, tuple[object, ...]]] = {
    "suffix": ("inserting text before a suffix", (None, "")),
    "tools": ("calling tools", (None, [])),
    "tool_choice": ("calling tools", (None, "none", "auto")),
    "functions": ("calling functions", (None, [])),
    "function_call": ("calling functions", (None, "none", "auto")),
    "response_format": ("structured output", (None, {"type": "text"})),
    "structured_outputs": ("structured output", (None,)),
    "guided_json": ("structured output", (None,)),
    "guided_regex": ("structured output", (None,)),
    "guided_choice": ("structured output", (None,)),
    "guided_grammar": ("structured output", (None,)),
    "guided_decoding_backend": ("structured output", (None,)),
    "modalities": ("output other than text", (None, ["text"])),
    "audio": ("output other than text", (None,)),
    "web_search_options": ("searching the web", (None,)),
    "reasoning_effort": ("setting an effort for reasoning (some models take it in chat_template_kwargs)", (None,)),
    "verbosity": ("setting a verbosity", (None, "medium")),
    "use_beam_search": ("beam search", (None, False)),
    "length_penalty": ("beam search", (None, 1, 1.0)),
    "early_stopping": ("beam search", (None, False)),
    "truncate_prompt_tokens": ("truncating prompts", (None,)),
    "allowed_token_ids": ("restricting the vocabulary (logit_bias can)", (None,)),
    "bad_words": ("banning words (logit_bias bans tokens)", (None, [])),
    "logits_processors": ("logits processors", (None, [])),
    "spaces_between_special_tokens": ("joining special tokens without spaces", (None, True)),
    "chat_template": ("a chat template in the request (start the server with --chat-template)", (None,)),
    "documents": ("documents beside the conversation", (None,)),
    "prompt_embeds": ("prompts as embeddings", (None,)),
    "return_token_ids": ("returning token ids (/tokenize does)", (None, False)),
    "return_tokens_as_token_ids": ("returning token ids (/tokenize does)", (None, False)),
}
"""What this server cannot do, by field: what to call it, and the values that do not ask for it."""


class RequestModel(BaseModel):
    """A request body. Types are strict: "1" is not a number, and true is not 1."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    lenient: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def _drop_unused(cls, data: Any) -> Any:
        """Takes out what is harmless or not wanted; raises RequestError for what is wanted and missing."""
        if not isinstance(data, dict) or not cls.lenient:
            return cast("Any", data)
        fields = cast("dict[str, Any]", data)
        unused = [name for name in fields if name not in cls.model_fields]
        kept = {name: value for name, value in fields.items() if name not in HARMLESS or name not in unused}
        for name in unused:
            if name in UNSUPPORTED:
                _refuse_unless_default(name, kept.pop(name), fields)
        return kept


def _refuse_unless_default(name: str, value: Any, fields: dict[str, Any]) -> None:
    feature, passing = UNSUPPORTED[name]
    if any(value == default and type(value) is type(default) for default in passing):
        return
    not_called = (name == "tools" and fields.get("tool_choice") == "none") or (
        name == "functions" and fields.get("function_call") == "none"
    )
    if not not_called:
        raise RequestError(
            f"'{name}' is not supported: this server does not offer {feature}. Leave the field out.",
            param=name,
            code="unsupported_parameter",
        )


class StreamOptions(RequestModel):
    """Attributes as OpenAI has them, and vLLM's continuous_usage_stats: usage so far in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class SamplingRequest(RequestModel):
    """What completions and chat completions have in common. None takes the model's default."""

    lenient: ClassVar[bool] = True

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases = Field(default_factory=dict[int, float])
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stops = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    priority: Int32 | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _check_streaming(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for streams only; set stream to true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError("prompt_logprobs cannot be streamed; set stream to false", param="prompt_logprobs")
        return self


class CompletionRequest(SamplingRequest):
    """Body of /v1/completions."""

    prompt: Prompts
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None

    @model_validator(mode="after")
    def _check_best_of(self) -> "CompletionRequest":
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise RequestError(f"best_of ({self.best_of}) must be at least n ({n})", param="best_of")
        if self.best_of is not None and self.best_of != n and self.stream:
            raise RequestError("best_of cannot be streamed unless it equals n; set stream to false", param="best_of")
        return self


class ChatMessage(RequestModel):
    """One message. An assistant's may be sent back as it was received."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it."""
        content = self.content if self.content is not None else self.refusal
        fields = {
            "role": self.role,
            "content": content,
            "name": self.name,
            "tool_calls": self.tool_calls or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "\n".join(part["text"] for part in self.content)
        return self.content or ""


class ChatRequest(SamplingRequest):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs; set logprobs to true", param="top_logprobs")
        return self


class TokenizeRequest(RequestModel):
    """Body of /tokenize: a prompt, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_source(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("send either a prompt or messages", param="prompt")
        return self


class DetokenizeRequest(RequestModel):
    """Body of /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


Body = TypeVar("Body", bound=RequestModel)


def parse_body(model: type[Body], body: bytes) -> Body:
    """Validate a request body.

    Raises:
        RequestError: it is not JSON (RFC 8259: no NaN, valid UTF-8), or does not fit the model; `param` is the path of
            the first field that does not.
    """
    try:
        data: Any = pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise RequestError(f"the request body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise RequestError("the request body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from error


def _explain(error: ValidationError) -> RequestError:
    """The first problem in OpenAI's words: the path of the field, and what it must be."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = _path(problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            return RequestError(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")
        case "missing":
            return RequestError(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")
        case "value_error":
            return RequestError(f"'{path}' {problem['msg'].removeprefix('Value error, ')}.", param=path)
        case _:
            return RequestError(f"'{path}': {problem['msg'][:1].lower()}{problem['msg'][1:]}.", param=path)


def _path(loc: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as messages[0].role; names are cut, because a client chose them."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part[:64]}"
    return path.lstrip(".")
