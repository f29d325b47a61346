"""What a request may ask of sampling. Names and defaults are vLLM's."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tenfold.base.errors import RequestError

MAX_BIAS_ENTRIES = 512  # token ids that logit_bias, and end tokens held back by min_tokens, may name together
MAX_LOGPROBS = 20
MAX_N = 128

Number = float | int
"""What may be given for a float. PEP 484 implies the int; runtime checkers do not."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, and when it ends.

    Attributes:
        n: how many completions of the prompt.
        temperature: 0 picks the most likely token.
        top_k: sample among this many most likely tokens; 0 or -1 among all.
        top_p: sample among the fewest most likely tokens whose probabilities reach this sum.
        min_p: drop tokens less likely than this share of the most likely one.
        repetition_penalty: divides (or multiplies) the logits of tokens of the prompt and the output (CTRL).
        presence_penalty, frequency_penalty: OpenAI's, over the output.
        logit_bias: added to the logits of these tokens.
        seed: the same seed and prompt give the same tokens; None draws one.
        max_tokens: longest output; None up to the context's end.
        min_tokens: no end token before this many.
        stop: a string, or several, that end the output where they first appear; the text layer watches for them. Kept
            as a tuple.
        stop_token_ids: further tokens that end the output. Kept as a tuple.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: go on after the model's end tokens.
        logprobs: also return this many most likely tokens at every step, and the chosen one's log-probability.
        prompt_logprobs: the same for every token of the prompt.
        skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    temperature: Number = 1.0
    top_k: int = 0
    top_p: Number = 1.0
    min_p: Number = 0.0
    repetition_penalty: Number = 1.0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    logit_bias: Mapping[int, Number] = field(default_factory=dict[int, float])
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        _check_range("n", self.n, 1, MAX_N)
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, -1, 2**31 - 1)
        _check_range("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise RequestError(
                    f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens}).", param="min_tokens"
                )
        if self.seed is not None:
            _check_range("seed", self.seed, -(2**63), 2**64 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, 0, MAX_LOGPROBS)
        if any(not s for s in self.stop):
            raise RequestError("stop must not hold an empty string: it would end every output at once.", param="stop")
        for token, bias in self.logit_bias.items():
            if token < 0 or not -100.0 <= bias <= 100.0:
                raise RequestError(
                    f"logit_bias maps token ids to values from -100 to 100; it has {token}: {bias}.", param="logit_bias"
                )
        if len(self.logit_bias) + len(self.stop_token_ids) > MAX_BIAS_ENTRIES - 32:
            raise RequestError(
                f"logit_bias and stop_token_ids may name {MAX_BIAS_ENTRIES - 32} tokens together.", param="logit_bias"
            )


def _check_range(name: str, value: Number, low: Number, high: Number, *, above: bool = False) -> None:
    """Raises RequestError unless low <= value <= high (low < value with `above`); nan is never in range."""
    if math.isfinite(value) and (low < value if above else low <= value) and value <= high:
        return
    bounds = f"above {low} and at most {high}" if above else f"from {low} to {high}"
    raise RequestError(f"{name} must be {bounds}; it is {value}.", param=name)
