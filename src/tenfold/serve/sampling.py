"""From a request's fields to SamplingParams."""

from collections.abc import Mapping
from typing import Any

from tenfold.engine.sampling_params import SamplingParams
from tenfold.serve.protocol import ChatRequest, CompletionRequest, SamplingRequest

COMPLETION_MAX_TOKENS = 16  # OpenAI's default

_PLAIN_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "prompt_logprobs",
)


def completion_params(request: CompletionRequest, defaults: Mapping[str, float | int]) -> SamplingParams:
    """Sampling of a completion; `best_of` completions are made, and ranked by their log-probabilities.

    Where only the prompt is wanted back (echo with max_tokens 0), one token is made and dropped.

    Raises:
        RequestError: a field is out of its range.
    """
    n = request.n or 1
    best_of = request.best_of or n
    logprobs = request.logprobs
    if best_of > n and logprobs is None:
        logprobs = 0
    prompt_logprobs = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = int(defaults.get("max_tokens", COMPLETION_MAX_TOKENS))
    return _params(
        request, defaults, n=best_of, max_tokens=max(max_tokens, 1), logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )


def chat_params(request: ChatRequest, defaults: Mapping[str, float | int]) -> SamplingParams:
    """Sampling of a chat completion, up to the context's end unless the request or the model says otherwise.

    Raises:
        RequestError: a field is out of its range.
    """
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is None and "max_tokens" in defaults:
        max_tokens = int(defaults["max_tokens"])
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return _params(request, defaults, n=request.n or 1, max_tokens=max_tokens, logprobs=logprobs)


def _params(request: SamplingRequest, defaults: Mapping[str, float | int], **fixed: Any) -> SamplingParams:
    fields: dict[str, Any] = {name: value for name, value in defaults.items() if name != "max_tokens"}
    fields |= {name: value for name in _PLAIN_FIELDS if (value := getattr(request, name)) is not None}
    fields |= {"stop": request.stop, "logit_bias": request.logit_bias}
    return SamplingParams(**(fields | fixed))
