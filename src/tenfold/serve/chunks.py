"""The JSON of streamed chunks, put together from bytes: this runs for every token of every client."""

from dataclasses import dataclass, field
from typing import Any

import orjson

from tenfold.serve.protocol import StreamOptions


@dataclass(kw_only=True)
class Usage:
    """Tokens of one request: of all its prompts, those found in the prefix cache, and of all its completions."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: dict[int, int] = field(default_factory=dict[int, int])

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }


class ChunkFormat:
    """Server-sent events of one streamed response.

    Args:
        response_id, kind, created, model: what every chunk carries; `kind` is its "object".
        options: whether and when usage is told.
        usage: filled by the caller as the stream goes on.
    """

    def __init__(
        self, response_id: str, kind: str, created: int, model: str, options: StreamOptions | None, usage: Usage
    ) -> None:
        head = orjson.dumps({"id": response_id, "object": kind, "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._include_usage = options is not None and bool(options.include_usage)
        self._continuous = options is not None and bool(options.continuous_usage_stats)
        self._usage = usage
        self._tail = b'],"usage":null}\n\n' if self._include_usage else b"]}\n\n"

    def chunk(self, index: int, fields: bytes) -> bytes:
        """One event for one choice; `fields` is the inside of the choice after its index."""
        tail = self._usage_tail() if self._continuous else self._tail
        return b'%b{"index":%d,%b}%b' % (self._head, index, fields, tail)

    def last(self) -> bytes:
        """The event with the usage and no choices, if it was asked for."""
        return self._head + self._usage_tail() if self._include_usage else b""

    def _usage_tail(self) -> bytes:
        return b'],"usage":' + orjson.dumps(self._usage.as_json()) + b"}\n\n"
