"""Log-probabilities in the API's three shapes: chat's, completions' of old, and vLLM's for prompts."""

from collections.abc import Iterable, Sequence
from typing import Any

from tenfold.data.completion import CompletionText
from tenfold.data.tokenizer import Tokenizer
from tenfold.engine.outputs import TokenLogprobs

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
) -> list[dict[str, Any]]:
    """One entry per token: text, log-probability, UTF-8 bytes, and the same for the most likely tokens there."""
    return [
        {
            **_chat_token(tokenizer, token_id, entry.logprob),
            "top_logprobs": [_chat_token(tokenizer, top_id, value) for top_id, value in entry.top[:num_top]],
        }
        for token_id, entry in zip(token_ids, logprobs, strict=True)
    ]


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(data)}


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs | None],
    offsets: Iterable[int],
    num_top: int,
) -> dict[str, list[Any]]:
    """Four lists, one item per token each. A prompt's first token has no log-probability: null.

    `top_logprobs` maps the most likely tokens to their log-probabilities, and the token that stands there to its own. A
    token that is not valid UTF-8 by itself is spelled as its bytes, so that no two share a key.
    """
    tops: list[dict[str, float] | None] = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        if entry is None:
            tops.append(None)
            continue
        top = {_spelled(tokenizer, top_id): max(value, LOWEST) for top_id, value in entry.top[:num_top]}
        tops.append({_spelled(tokenizer, token_id): max(entry.logprob, LOWEST)} | top)
    return {
        "tokens": [_spelled(tokenizer, token_id) for token_id in token_ids],
        "token_logprobs": [None if entry is None else max(entry.logprob, LOWEST) for entry in logprobs],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def _spelled(tokenizer: Tokenizer, token_id: int) -> str:
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], *, skip_special_tokens: bool) -> tuple[int, ...]:
    """Where each of a prompt's tokens begins in the prompt's decoding, in characters."""
    text = CompletionText(tokenizer, skip_special_tokens=skip_special_tokens)
    return text.push(token_ids, final=True).offsets


def prompt_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None], num_top: int
) -> list[dict[str, Any] | None]:
    """vLLM's shape: by token id, the log-probability, rank and text of the most likely tokens and of the one there."""
    entries: list[dict[str, Any] | None] = []
    for token_id, entry in zip(token_ids, logprobs, strict=True):
        if entry is None:
            entries.append(None)
            continue
        ranked = {top_id: (rank, value) for rank, (top_id, value) in enumerate(entry.top[:num_top], start=1)}
        ranked[token_id] = (entry.rank, entry.logprob)
        entries.append(
            {
                str(top_id): {
                    "logprob": max(value, LOWEST),
                    "rank": rank,
                    "decoded_token": tokenizer.token(top_id),
                }
                for top_id, (rank, value) in ranked.items()
            }
        )
    return entries
