"""The `openai` SDK talks to `tenfold serve` over a socket, as it does to OpenAI."""

import asyncio
import math
from collections.abc import Iterator

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tenfold.testing.byte_tokenizer import END_ID
from tests.serve.conftest import ServerProcess, until

pytestmark = pytest.mark.timeout(400)  # the first start on a machine compiles

QUESTION = [{"role": "user", "content": "What is a tenfold increase?"}]
LONG = "All work and no play makes Jack a dull boy. " * 6


@pytest.fixture(scope="module")
def client(tenfold_server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tenfold_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: OpenAI):
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == 512
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


def test_chat(client: OpenAI):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=12, temperature=0)
    assert again.choices[0].message.content == answer.choices[0].message.content


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 7}])
def test_streams_say_the_same(client: OpenAI, sampling: dict):
    asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 40, **sampling}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_sdks_own_stream_helper(client: OpenAI):
    ending = {
        "logit_bias": {str(END_ID): 100},
        "extra_body": {"min_tokens": 6},
    }  # so that it does not end for its length
    asked = {"model": "tiny", "messages": QUESTION, "temperature": 0, **ending}
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**asked)
    assert whole.usage.completion_tokens == 7
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_an_answer_goes_back_as_it_came(client: OpenAI):
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=4)
    talk = [*QUESTION, answer.choices[0].message, *QUESTION]
    assert client.chat.completions.create(model="tiny", messages=talk, max_tokens=4).choices


def test_n(client: OpenAI):
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=8, n=3, temperature=1, seed=3, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 24


def test_chat_logprobs(client: OpenAI):
    answer = client.chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=5, temperature=0, logprobs=True, top_logprobs=4
    )
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == answer.usage.completion_tokens
    for token in tokens:
        assert token.logprob == token.top_logprobs[0].logprob  # greedy: the likeliest
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-5
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )


def test_completion_logprobs_score_the_same_alone_and_echoed(client: OpenAI):
    made = client.completions.create(model="tiny", prompt="abc", max_tokens=6, temperature=0, logprobs=0)
    ids = client.post("/../tokenize", body={"prompt": "abc"}, cast_to=object)["tokens"]
    assert made.usage.prompt_tokens == len(ids)
    scored = client.completions.create(model="tiny", prompt=ids, max_tokens=0, temperature=0, logprobs=0, echo=True)
    assert scored.choices[0].logprobs.token_logprobs[0] is None
    assert len(scored.choices[0].logprobs.tokens) == len(ids)
    assert scored.choices[0].text == "abc"
    assert len(made.choices[0].logprobs.tokens) == made.usage.completion_tokens


def test_lists_of_prompts_are_answered_as_each_alone(client: OpenAI):
    prompts = ["one", "two and a half", "three"]
    together = client.completions.create(model="tiny", prompt=prompts, max_tokens=8, temperature=0)
    alone = [client.completions.create(model="tiny", prompt=p, max_tokens=8, temperature=0) for p in prompts]
    assert [choice.text for choice in together.choices] == [one.choices[0].text for one in alone]


def test_a_prompt_asked_before_is_cached(client: OpenAI):
    def cached() -> int:
        answer = client.completions.create(model="tiny", prompt=LONG, max_tokens=1)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert cached() == 0
    assert cached() > 200


def test_logit_bias_decides(client: OpenAI):
    a = client.post("/../tokenize", body={"prompt": "a", "add_special_tokens": False}, cast_to=object)["tokens"][0]
    made = client.completions.create(model="tiny", prompt="x", max_tokens=3, temperature=0, logit_bias={str(a): 100})
    assert made.choices[0].text == "aaa"


@pytest.mark.parametrize(
    ("body", "error", "param"),
    [
        ({"model": "huge"}, openai.NotFoundError, "model"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"temperature": 1000}, openai.BadRequestError, "temperature"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": LONG * 4}]}, openai.BadRequestError, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format"),
        ({"extra_body": {"tempreature": 1}}, openai.BadRequestError, "tempreature"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_sdks_own(client: OpenAI, body: dict, error: type, param: str, stream: bool):
    with pytest.raises(error) as caught:
        client.chat.completions.create(**({"model": "tiny", "messages": QUESTION} | body), stream=stream)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_leaving_a_stream_ends_it(client: OpenAI, tenfold_server: ServerProcess):
    with client.completions.create(
        model="tiny", prompt="abc", max_tokens=500, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    until(lambda: tenfold_server.metrics()["tenfold_num_requests_running"] == 0)
    until(lambda: tenfold_server.metrics()["tenfold_kv_cache_pages_used"] == 0)


async def test_many_at_once(tenfold_server: ServerProcess):
    """More than run at once, streamed and whole, each answered as if it were alone."""
    prompts = [f"number {i}" for i in range(12)]
    async with AsyncOpenAI(base_url=f"{tenfold_server.url}/v1", api_key="none", max_retries=0) as client:

        async def whole(prompt: str) -> str:
            made = await client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
            return made.choices[0].text

        async def streamed(prompt: str) -> str:
            chunks = await client.completions.create(
                model="tiny", prompt=prompt, max_tokens=20, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks])

        alone = [await whole(prompt) for prompt in prompts]
        assert await asyncio.gather(*(whole(prompt) for prompt in prompts)) == alone
        assert await asyncio.gather(*(streamed(prompt) for prompt in prompts)) == alone


async def test_cancelling_a_request_ends_it(tenfold_server: ServerProcess):
    async with AsyncOpenAI(base_url=f"{tenfold_server.url}/v1", api_key="none", max_retries=0) as client:
        asked = client.completions.create(model="tiny", prompt="abc", max_tokens=500, extra_body={"ignore_eos": True})
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asked, 0.05)
    until(lambda: tenfold_server.metrics()["tenfold_num_requests_running"] == 0)


def test_nothing_was_compiled_for_all_this(client: OpenAI, tenfold_server: ServerProcess):
    metrics = tenfold_server.metrics()
    assert metrics["tenfold_compilations_since_ready_total"] == 0
    assert metrics["tenfold_engine_restarts_total"] == 0
    assert metrics["tenfold_generation_tokens_total"] > 100
