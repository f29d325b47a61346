"""/v1/completions."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from tenfold.base.errors import RequestError
from tenfold.data.tokenizer import Tokenizer
from tenfold.engine.outputs import TokenLogprobs
from tenfold.serve.body import read_body
from tenfold.serve.chunks import ChunkFormat, Usage
from tenfold.serve.collect import Choice, Collected, collect
from tenfold.serve.generation import Delta, Job, run
from tenfold.serve.logprobs import completion_logprobs, prompt_logprobs, prompt_offsets
from tenfold.serve.protocol import CompletionRequest, parse_body
from tenfold.serve.sampling import completion_params
from tenfold.serve.sse import EventStream, Write, while_connected
from tenfold.serve.state import ServerState

KIND = "text_completion"


@dataclass(frozen=True, kw_only=True)
class _Completion:
    """One request while it is answered.

    Attributes:
        echoes: the text of each prompt where it is to be repeated, else "".
    """

    request: CompletionRequest
    job: Job
    echoes: Sequence[str]
    tokenizer: Tokenizer
    response_id: str
    created: int
    model: str

    @property
    def n(self) -> int:
        """Choices per prompt in the response."""
        return self.request.n or 1

    @property
    def drops_output(self) -> bool:
        """Only the prompt is wanted back."""
        return self.request.max_tokens == 0

    def logprobs(
        self, delta: Delta | Choice, echoed: tuple[TokenLogprobs | None, ...] | None = None
    ) -> dict[str, Any] | None:
        """OpenAI's logprobs of some of a completion's tokens, behind those of the prompt if `echoed` has them."""
        num_top = self.request.logprobs
        if num_top is None:
            return None
        shift = len(self.echoes[delta.prompt])
        token_ids = [] if self.drops_output else list(delta.token_ids)
        entries: list[TokenLogprobs | None] = [] if self.drops_output else list(delta.logprobs or ())
        offsets = [] if self.drops_output else [shift + offset for offset in delta.offsets]
        if echoed is not None and self.request.echo:
            prompt = self.job.prompts[delta.prompt]
            token_ids[:0], entries[:0] = prompt, echoed
            skip = self.job.params.skip_special_tokens
            offsets[:0] = prompt_offsets(self.tokenizer, prompt, skip_special_tokens=skip)
        return completion_logprobs(self.tokenizer, token_ids, entries, offsets, num_top)


async def create_completion(state: ServerState, http: Request) -> Response:
    """Answer one request, whole or as a stream.

    Raises:
        TenfoldError: before the first byte of the response; see `errors.as_http_error`.
    """
    arrived = time.perf_counter()
    request = parse_body(CompletionRequest, await read_body(http, state.config.max_request_bytes))
    state.require_model(request.model)
    state.require_ready()
    completion = await _prepare(state, request, arrived)
    if request.stream:
        return EventStream(lambda write: _stream(state, completion, write))
    collected = await while_connected(http.receive, collect(state, completion.job))
    if collected is None:
        return Response(status_code=499)  # nobody is there to read it
    return Response(orjson.dumps(_render(completion, collected)), media_type="application/json")


async def _prepare(state: ServerState, request: CompletionRequest, arrived: float) -> _Completion:
    params = completion_params(request, state.config.sampling_defaults)
    if len(request.prompt) * params.n > state.config.max_pending:
        raise RequestError(
            f"{len(request.prompt)} prompts with {params.n} completions each are more than this server takes at once, "
            f"which is {state.config.max_pending}; send fewer in one request",
            param="prompt",
        )
    texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
    add_special_tokens = request.add_special_tokens is not False
    encoded = iter(await state.encode(texts, add_special_tokens=add_special_tokens, param="prompt") if texts else ())
    prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in request.prompt]
    echoes = [""] * len(prompts)
    if request.echo:
        echoes = [
            prompt
            if isinstance(prompt, str)
            else await state.run_text(state.tokenizer.decode, prompt, skip_special_tokens=params.skip_special_tokens)
            for prompt in request.prompt
        ]
    response_id = f"cmpl-{uuid.uuid4().hex}"
    job = Job(
        request_id=response_id,
        prompts=prompts,
        params=params,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        source="prompt",
        arrived=arrived,
    )
    return _Completion(
        request=request,
        job=job,
        echoes=echoes,
        tokenizer=state.tokenizer,
        response_id=response_id,
        created=int(time.time()),
        model=state.config.model_names[0],
    )


def _render(completion: _Completion, collected: Collected) -> dict[str, Any]:
    """The response of a request that is not streamed."""
    request, usage = completion.request, collected.usage
    choices: list[dict[str, Any]] = []
    for prompt, made in enumerate(collected.choices):
        best = sorted(made, key=lambda choice: -choice.mean_logprob)[: completion.n] if request.best_of else made
        echoed = collected.prompt_logprobs[prompt]
        for place, choice in enumerate(best):
            fields: dict[str, Any] = {
                "index": prompt * completion.n + place,
                "text": completion.echoes[prompt] + ("" if completion.drops_output else choice.text),
                "logprobs": completion.logprobs(choice, echoed),
                "finish_reason": "length" if completion.drops_output else choice.finish_reason,
                "stop_reason": None if completion.drops_output else choice.stop_reason,
            }
            if request.prompt_logprobs is not None and echoed is not None:
                ids = completion.job.prompts[prompt]
                fields["prompt_logprobs"] = prompt_logprobs(completion.tokenizer, ids, echoed, request.prompt_logprobs)
            choices.append(fields)
    if completion.drops_output:
        usage.completion_tokens = 0
    return {
        "id": completion.response_id,
        "object": KIND,
        "created": completion.created,
        "model": completion.model,
        "choices": choices,
        "usage": usage.as_json(),
    }


async def _stream(state: ServerState, completion: _Completion, write: Write) -> None:
    """Write a request's events, but for the last, `[DONE]`."""
    job = completion.job
    usage = Usage(prompt_tokens=sum(map(len, job.prompts)))
    options = completion.request.stream_options
    chunks = ChunkFormat(completion.response_id, KIND, completion.created, completion.model, options, usage)
    begun: set[tuple[int, int]] = set()

    async def emit(delta: Delta) -> None:
        usage.cached_tokens.setdefault(delta.prompt, delta.num_cached_tokens)
        if not completion.drops_output:
            usage.completion_tokens += len(delta.token_ids)
        first = (delta.prompt, delta.index) not in begun
        begun.add((delta.prompt, delta.index))
        events = _events(completion, chunks, delta, first=first)
        if events:
            await write(events)

    await run(state, job, emit)
    last = chunks.last()
    if last:
        await write(last)


def _events(completion: _Completion, chunks: ChunkFormat, delta: Delta, *, first: bool) -> bytes:
    """The events of one increment; may be none, while text is held back."""
    index = delta.prompt * completion.n + delta.index
    text = "" if completion.drops_output else delta.text
    echoed = None
    if first:
        text = completion.echoes[delta.prompt] + text
        echoed = delta.prompt_logprobs
    events = b""
    logprobs = completion.logprobs(delta, echoed)
    if text or (logprobs is not None and logprobs["tokens"]):
        events = chunks.chunk(
            index, b'"text":%b,"logprobs":%b,"finish_reason":null' % (orjson.dumps(text), orjson.dumps(logprobs))
        )
    if delta.finish_reason is not None:
        reason = "length" if completion.drops_output else delta.finish_reason
        stop = None if completion.drops_output else delta.stop_reason
        events += chunks.chunk(
            index,
            b'"text":"","logprobs":null,"finish_reason":%b,"stop_reason":%b'
            % (orjson.dumps(reason), orjson.dumps(stop)),
        )
    return events
