"""/v1/chat/completions."""

import time
import uuid
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from tenfold.data.tokenizer import Tokenizer
from tenfold.serve.body import read_body
from tenfold.serve.chunks import ChunkFormat, Usage
from tenfold.serve.collect import Choice, Collected, collect
from tenfold.serve.generation import Delta, Job, run
from tenfold.serve.logprobs import chat_logprobs, prompt_logprobs
from tenfold.serve.prompt import encode_messages
from tenfold.serve.protocol import ChatRequest, parse_body
from tenfold.serve.sampling import chat_params
from tenfold.serve.sse import EventStream, Write, while_connected
from tenfold.serve.state import ServerState


@dataclass(frozen=True, kw_only=True)
class _Chat:
    """One request while it is answered.

    Attributes:
        echo: the beginning of every answer: the final message where it is the assistant's and to be repeated.
    """

    request: ChatRequest
    job: Job
    echo: str
    tokenizer: Tokenizer
    response_id: str
    created: int
    model: str

    def logprobs(self, delta: Delta | Choice) -> dict[str, Any] | None:
        """OpenAI's logprobs of some of a completion's tokens, if they were asked for."""
        if not self.request.logprobs:
            return None
        num_top = self.request.top_logprobs or 0
        content = chat_logprobs(self.tokenizer, delta.token_ids, delta.logprobs or (), num_top)
        return {"content": content, "refusal": None}


async def create_chat_completion(state: ServerState, http: Request) -> Response:
    """Answer one request, whole or as a stream.

    Raises:
        TenfoldError: before the first byte of the response; see `errors.as_http_error`.
    """
    arrived = time.perf_counter()
    request = parse_body(ChatRequest, await read_body(http, state.config.max_request_bytes))
    state.require_model(request.model)
    state.require_ready()
    chat = await _prepare(state, request, arrived)
    if request.stream:
        return EventStream(lambda write: _stream(state, chat, write))
    collected = await while_connected(http.receive, collect(state, chat.job))
    if collected is None:
        return Response(status_code=499)  # nobody is there to read it
    return Response(orjson.dumps(_render(chat, collected)), media_type="application/json")


async def _prepare(state: ServerState, request: ChatRequest, arrived: float) -> _Chat:
    params = chat_params(request, state.config.sampling_defaults)
    final = request.messages[-1]
    echo = final.text() if request.echo and final.role == "assistant" else ""
    response_id = f"chatcmpl-{uuid.uuid4().hex}"
    job = Job(
        request_id=response_id,
        prompts=[await encode_messages(state, request.messages, request)],
        params=params,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        source="messages",
        arrived=arrived,
    )
    return _Chat(
        request=request,
        job=job,
        echo=echo,
        tokenizer=state.tokenizer,
        response_id=response_id,
        created=int(time.time()),
        model=state.config.model_names[0],
    )


def _render(chat: _Chat, collected: Collected) -> dict[str, Any]:
    """The response of a request that is not streamed."""
    response: dict[str, Any] = {
        "id": chat.response_id,
        "object": "chat.completion",
        "created": chat.created,
        "model": chat.model,
        "choices": [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": chat.echo + choice.text, "refusal": None},
                "logprobs": chat.logprobs(choice),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            for choice in collected.choices[0]
        ],
        "usage": collected.usage.as_json(),
    }
    num_top, logprobs = chat.request.prompt_logprobs, collected.prompt_logprobs[0]
    if num_top is not None and logprobs is not None:
        response["prompt_logprobs"] = prompt_logprobs(chat.tokenizer, chat.job.prompts[0], logprobs, num_top)
    return response


async def _stream(state: ServerState, chat: _Chat, write: Write) -> None:
    """Write a request's events, but for the last, `[DONE]`."""
    usage = Usage(prompt_tokens=len(chat.job.prompts[0]))
    options = chat.request.stream_options
    chunks = ChunkFormat(chat.response_id, "chat.completion.chunk", chat.created, chat.model, options, usage)
    begun: set[int] = set()

    async def emit(delta: Delta) -> None:
        usage.cached_tokens.setdefault(0, delta.num_cached_tokens)
        usage.completion_tokens += len(delta.token_ids)
        events = b""
        if delta.index not in begun:
            begun.add(delta.index)
            events = _first_events(chat, chunks, delta.index)
        events += _events(chat, chunks, delta)
        if events:
            await write(events)

    await run(state, chat.job, emit)
    last = chunks.last()
    if last:
        await write(last)


def _first_events(chat: _Chat, chunks: ChunkFormat, index: int) -> bytes:
    fields = b'"delta":%b,"logprobs":null,"finish_reason":null'
    events = chunks.chunk(index, fields % b'{"role":"assistant","content":"","refusal":null}')
    if chat.echo:
        events += chunks.chunk(index, fields % orjson.dumps({"content": chat.echo}))
    return events


def _events(chat: _Chat, chunks: ChunkFormat, delta: Delta) -> bytes:
    """The events of one increment; may be none, while text is held back."""
    events = b""
    logprobs = chat.logprobs(delta)
    if delta.text or (logprobs is not None and delta.token_ids):
        content, shown = orjson.dumps(delta.text), b"null" if logprobs is None else orjson.dumps(logprobs)
        events = chunks.chunk(
            delta.index, b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null' % (content, shown)
        )
    if delta.finish_reason is not None:
        reason, stop = orjson.dumps(delta.finish_reason), orjson.dumps(delta.stop_reason)
        events += chunks.chunk(
            delta.index, b'"delta":{},"logprobs":null,"finish_reason":%b,"stop_reason":%b' % (reason, stop)
        )
    return events
