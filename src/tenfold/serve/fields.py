"""Field types of requests: what pydantic cannot say on its own, or says in words that help nobody."""

from typing import Annotated, Any, cast

from pydantic import Field, PlainValidator, WithJsonSchema

from tenfold.base.errors import RequestError

MAX_STOPS = 16
MAX_TOKEN_ID = 2**31 - 1

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]

_TOKENS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
    "minItems": 1,
}
_PROMPT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _TOKENS_SCHEMA,
        {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1},
    ],
    "description": "One prompt or several, as text or as token ids.",
}
_STOP_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
        {"type": "null"},
    ],
}
_CONTENT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
        {"type": "null"},
    ],
}
_BIAS_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        {"type": "null"},
    ],
}


def _prompts(value: Any) -> list[str | list[int]]:
    """A list of prompts out of any of the four forms of OpenAI's `prompt`."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        items = cast("list[Any]", value)
        if _are_token_ids(items):
            return [items]
        if all(isinstance(item, str) for item in items) or all(_is_prompt_of_ids(item) for item in items):
            return items
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _are_token_ids(items: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item <= MAX_TOKEN_ID for item in items)


def _is_prompt_of_ids(item: Any) -> bool:
    return isinstance(item, list) and item != [] and _are_token_ids(cast("list[Any]", item))


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,) if value else ()
    items = cast("list[Any]", value)
    if not isinstance(value, list) or len(items) > MAX_STOPS or not all(isinstance(item, str) for item in items):
        raise ValueError(f"must be a string or a list of at most {MAX_STOPS} strings")
    if not all(items):
        raise ValueError("must not hold an empty string, which would end every output at once")
    return tuple(items)


def _content(value: Any) -> str | list[dict[str, Any]] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content parts")
    return [_text_part(part) for part in cast("list[Any]", value)]


def _text_part(part: Any) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):  # pyright: ignore[reportUnknownMemberType]
        raise ValueError('holds a part that is not an object with a type; send {"type": "text", "text": "..."}')
    fields = cast("dict[str, Any]", part)
    kind = fields["type"]
    if kind not in ("text", "refusal"):
        raise RequestError(
            f'content parts of type "{kind}" are not supported: this server reads text only', param="messages"
        )
    if not isinstance(fields.get(kind), str):
        raise ValueError(f'holds a part of type "{kind}" whose "{kind}" is not a string')
    return {"type": "text", "text": fields[kind]}


def _biases(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object that maps token ids to numbers from -100 to 100")
    biases: dict[int, float] = {}
    for key, bias in cast("dict[str, Any]", value).items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 9):
            raise ValueError(f"has the key {key[:40]!r}; its keys are token ids")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"gives token {key} something that is not a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


Prompts = Annotated[list[str | list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops), WithJsonSchema(_STOP_SCHEMA)]
Content = Annotated[str | list[dict[str, Any]] | None, PlainValidator(_content), WithJsonSchema(_CONTENT_SCHEMA)]
Biases = Annotated[dict[int, float], PlainValidator(_biases), WithJsonSchema(_BIAS_SCHEMA)]
