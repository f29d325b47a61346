"""Between the engine's outputs and the endpoints: prompts in, increments of text out."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from tenfold.base.errors import EngineDeadError, OverloadedError, RequestError
from tenfold.data.completion import CompletionText
from tenfold.engine.outputs import EngineOutput, FinishReason, TokenLogprobs
from tenfold.engine.sampling_params import SamplingParams
from tenfold.serve.metrics import RequestTimer
from tenfold.serve.state import ServerState


@dataclass(kw_only=True, slots=True)
class Delta:
    """What one completion gained.

    Attributes:
        prompt, index: which prompt of the request, and which of its completions.
        text: may be "".
        token_ids, logprobs, offsets: of the new tokens; logprobs are there if they were asked for.
        prompt_logprobs: of the prompt's tokens, once, if they were asked for.
        finish_reason, stop_reason: set on the last delta; the stop string or stop token that ended it, if one did.
        num_cached_tokens: prompt tokens that were found in the prefix cache.
    """

    prompt: int
    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] | None
    offsets: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """The prompts of one request and what is to be done with each.

    Attributes:
        request_id: the client's handle; each prompt gets an id in the engine that begins with it.
        prompts: token ids.
        params: the same for all.
        priority, cache_salt: as `EngineProcess.generate` takes them.
        source: the request's field that the prompts are from, for errors about them.
        arrived: `time.perf_counter()` when the request came.
    """

    request_id: str
    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    source: str
    arrived: float


Emit = Callable[[Delta], Awaitable[None]]


async def run(state: ServerState, job: Job, emit: Emit) -> None:
    """Generate for all prompts of a job at once and hand every increment to `emit`.

    Cancelling it, or an error in one prompt or in `emit`, aborts all of them in the engine.

    Raises:
        RequestError, OverloadedError, EngineDeadError: from the engine.
    """
    if len(job.prompts) == 1:
        await _run_prompt(state, job, 0, emit)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for prompt in range(len(job.prompts)):
                group.create_task(_run_prompt(state, job, prompt, emit))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _run_prompt(state: ServerState, job: Job, prompt: int, emit: Emit) -> None:
    timer = RequestTimer(state.metrics, job.arrived)
    texts = [_open_text(state, job, prompt) for _ in range(job.params.n)]
    unfinished = set(range(job.params.n))
    request_id = f"{job.request_id}-{prompt}"
    outputs = state.engine.generate(
        request_id,
        job.prompts[prompt],
        job.params,
        priority=job.priority,
        cache_salt=job.cache_salt,
        interval_s=state.event_interval,
    )
    reason = "abort"
    try:
        async with aclosing(outputs):
            async for output in outputs:
                if output.index not in unfinished:
                    continue  # ended by a stop string, which the engine does not know of
                timer.tokens(output.index, len(output.token_ids))
                delta = _delta(prompt, output, texts[output.index])
                await emit(delta)
                if delta.finish_reason is not None:
                    unfinished.discard(delta.index)
                    timer.finished(delta.finish_reason)
                    if not unfinished:
                        break
    except OverloadedError:
        unfinished.clear()  # it never began
        raise
    except RequestError as error:
        unfinished.clear()
        if error.param != "prompt":
            raise
        raise RequestError(str(error), param=job.source, code=error.code) from error
    except EngineDeadError:
        reason = "error"
        raise
    finally:
        for _ in unfinished:
            timer.finished(reason)


def _open_text(state: ServerState, job: Job, prompt: int) -> CompletionText:
    params = job.params
    return CompletionText(
        state.tokenizer,
        prompt_token_ids=job.prompts[prompt],
        skip_special_tokens=params.skip_special_tokens,
        stop=tuple(params.stop),
        include_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )


def _delta(prompt: int, output: EngineOutput, text: CompletionText) -> Delta:
    """The text of an engine's output; a stop string in it overrules how the engine went on."""
    reason = output.finish_reason
    added = text.push(output.token_ids, final=reason is not None, stop_token=reason == "stop")
    kept = added.num_tokens
    stopped = added.stop is not None
    return Delta(
        prompt=prompt,
        index=output.index,
        text=added.text,
        token_ids=output.token_ids[:kept],
        logprobs=None if output.logprobs is None else output.logprobs[:kept],
        offsets=added.offsets,
        prompt_logprobs=output.prompt_logprobs,
        finish_reason="stop" if stopped else reason,
        stop_reason=added.stop if stopped else output.stop_reason,
        num_cached_tokens=output.num_cached_tokens,
    )
