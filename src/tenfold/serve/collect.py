"""Whole completions, for responses that are not streamed."""

from dataclasses import dataclass, field

from tenfold.engine.outputs import FinishReason, TokenLogprobs
from tenfold.serve.chunks import Usage
from tenfold.serve.generation import Delta, Job, run
from tenfold.serve.state import ServerState


@dataclass(kw_only=True)
class Choice:
    """One completion, whole. Fields as in `Delta`."""

    prompt: int
    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    offsets: list[int] = field(default_factory=list[int])
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def mean_logprob(self) -> float:
        """Per token; minus infinity for no tokens."""
        return sum(entry.logprob for entry in self.logprobs) / len(self.logprobs) if self.logprobs else float("-inf")


@dataclass(frozen=True, kw_only=True)
class Collected:
    """All completions of a job: `choices[prompt][index]`, and the prompts' own log-probabilities where asked for."""

    choices: list[list[Choice]]
    prompt_logprobs: list[tuple[TokenLogprobs | None, ...] | None]
    usage: Usage


async def collect(state: ServerState, job: Job) -> Collected:
    """Generate a job to its end. Raises what `generation.run` raises."""
    count = len(job.prompts)
    choices = [[Choice(prompt=p, index=i) for i in range(job.params.n)] for p in range(count)]
    texts: list[list[list[str]]] = [[[] for _ in range(job.params.n)] for _ in range(count)]
    prompt_logprobs: list[tuple[TokenLogprobs | None, ...] | None] = [None] * count
    usage = Usage(prompt_tokens=sum(map(len, job.prompts)))

    async def add(delta: Delta) -> None:
        choice = choices[delta.prompt][delta.index]
        texts[delta.prompt][delta.index].append(delta.text)
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs or ()
        choice.offsets += delta.offsets
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        usage.completion_tokens += len(delta.token_ids)
        usage.cached_tokens.setdefault(delta.prompt, delta.num_cached_tokens)
        if delta.prompt_logprobs is not None:
            prompt_logprobs[delta.prompt] = delta.prompt_logprobs

    await run(state, job, add)
    for row, row_texts in zip(choices, texts, strict=True):
        for choice, parts in zip(row, row_texts, strict=True):
            choice.text = "".join(parts)
    return Collected(choices=choices, prompt_logprobs=prompt_logprobs, usage=usage)
