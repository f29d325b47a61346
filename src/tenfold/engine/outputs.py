"""What the engine gives back: increments while it runs, whole outputs at the end."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, of the model's own distribution (before temperature and penalties).

    Attributes:
        token_id, logprob, rank: the token that stands there; rank 1 is the most likely.
        top: (token id, logprob) of the most likely tokens, best first; as many as were asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class EngineOutput(NamedTuple):
    """What one step produced for one sequence.

    Attributes:
        request_id: as given to `Engine.add`.
        index: which of the request's `n` completions.
        token_ids: tokens produced since the last output of this completion, in order.
        logprobs: one per token where they were asked for.
        prompt_logprobs: once, with the first output, where they were asked for: None for the first token.
        finish_reason: set on the last output of this completion.
        stop_reason: the token id (of stop_token_ids) that ended it, if one did.
        num_cached_tokens: prompt tokens found in the prefix cache.
    """

    request_id: str
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # hides tuple.index, which nobody needs here
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0


@dataclass(kw_only=True)
class CompletionOutput:
    """One completion of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A prompt with its completions, as `LLM.generate` returns it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finish_reason is not None for output in self.outputs)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What an engine serves.

    Attributes:
        architecture, dtype, device: as names; num_parameters: weights.
        vocab_size, max_model_len: bounds on a request's token ids and length.
        eos_token_ids: tokens that end an output.
        cache_bytes: size of the paged cache.
        longest_step_s: the slowest step that there can be, in seconds, as estimated by warm-up: every row at the end of
            the longest context. A step that takes several times as long has stalled.
    """

    architecture: str
    dtype: str
    device: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    cache_bytes: int
    longest_step_s: float


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """The engine's counters and gauges at one moment; totals count since the engine started.

    Attributes:
        steps: steps dispatched.
        running, waiting: sequences.
        pages_used, pages_total: of all page pools together; pages that only the prefix cache keeps are not used.
        prompt_tokens, generated_tokens: computed and sampled.
        prefix_queries, prefix_hits: prompt tokens looked up, and found.
        preemptions: sequences that gave their pages back and start over.
        compilations: XLA compilations since the engine was ready; anything but 0 is a bug.
    """

    steps: int = 0
    running: int = 0
    waiting: int = 0
    pages_used: int = 0
    pages_total: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    compilations: int = 0
