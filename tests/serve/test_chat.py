"""/v1/chat/completions over a counting engine: every conversation is answered "ABCD..." (see `letters`)."""

import pytest

from tests.serve.conftest import ServerProcess
from tests.serve.letters import ids

URL = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def chat(server: ServerProcess, **body: object) -> dict:
    response = server.post(URL, {"model": "letters", "messages": HI} | body)
    assert response.status_code == 200, response.text
    return response.json()


def content(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def test_shape(server: ServerProcess):
    answer = chat(server, max_tokens=3)
    assert answer.pop("id").startswith("chatcmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer == {
        "object": "chat.completion",
        "model": "letters",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ABC", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 5,  # <|user|> h i <|end|> <|assistant|>
            "completion_tokens": 3,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_other_name_of_the_model(server: ServerProcess):
    assert chat(server, model="alphabet", max_tokens=1)["model"] == "letters"


def test_lengths(server: ServerProcess):
    assert len(content(chat(server, max_completion_tokens=2, max_tokens=5))) == 2
    # Without a limit an answer goes on to an end token, which is reached by counting round the vocabulary.
    answer = chat(server)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 261 - 4 + 1
    ignoring = chat(server, ignore_eos=True)
    assert ignoring["choices"][0]["finish_reason"] == "length"
    assert ignoring["usage"]["total_tokens"] == 4096


@pytest.mark.parametrize(
    ("messages", "prompt_tokens"),
    [
        ([{"role": "system", "content": "be"}, *HI], 4 + 4 + 1),
        ([*HI, {"role": "assistant", "content": "yo"}, *HI], 4 + 4 + 4 + 1),
        ([{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}], 2 + 3 + 1),
        ([{"role": "user", "content": "hi", "name": "Bo"}], 5),
        ([*HI, {"role": "assistant", "content": None, "refusal": "no", "annotations": [], "tool_calls": []}, *HI], 13),
    ],
)
def test_conversations(server: ServerProcess, messages: list, prompt_tokens: int):
    assert chat(server, messages=messages, max_tokens=1)["usage"]["prompt_tokens"] == prompt_tokens


def test_going_on_with_the_last_message(server: ServerProcess):
    begun = [*HI, {"role": "assistant", "content": "XY"}]
    assert content(chat(server, messages=begun, continue_final_message=True, max_tokens=3)) == "Zab"
    both = chat(server, messages=begun, continue_final_message=True, echo=True, max_tokens=3)
    assert content(both) == "XYZab"
    response = server.post(URL, {"messages": begun, "continue_final_message": True, "add_generation_prompt": True})
    assert response.status_code == 400


def test_no_generation_prompt(server: ServerProcess):
    # The prompt then ends with <|end|>, after which the engine counts on to <|user|>.
    assert chat(server, add_generation_prompt=False, max_tokens=1)["usage"]["prompt_tokens"] == 4


def test_template_variables(server: ServerProcess):
    assert chat(server, chat_template_kwargs={"suffix": "ab"}, max_tokens=1)["usage"]["prompt_tokens"] == 7
    for name in ("messages", "add_generation_prompt", "self"):
        response = server.post(URL, {"messages": HI, "chat_template_kwargs": {name: []}})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "chat_template_kwargs"


def test_special_tokens_come_from_the_template(server: ServerProcess):
    assert chat(server, add_special_tokens=True, max_tokens=1)["usage"]["prompt_tokens"] == 6


def test_n(server: ServerProcess):
    answer = chat(server, n=3, max_tokens=3)
    assert [c["message"]["content"] for c in answer["choices"]] == ["ABC", "BDF", "CFI"]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 9,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_stop(server: ServerProcess):
    choice = chat(server, stop=["x", "DE"])["choices"][0]
    assert choice["message"]["content"] == "ABC"
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "DE")


def test_logprobs(server: ServerProcess):
    logprobs = chat(server, max_tokens=2, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]
    assert logprobs == {
        "content": [
            {
                "token": "A",
                "logprob": -0.5,
                "bytes": [65],
                "top_logprobs": [
                    {"token": "A", "logprob": -0.5, "bytes": [65]},
                    {"token": "B", "logprob": -1.0, "bytes": [66]},
                ],
            },
            {
                "token": "B",
                "logprob": -0.5,
                "bytes": [66],
                "top_logprobs": [
                    {"token": "B", "logprob": -0.5, "bytes": [66]},
                    {"token": "C", "logprob": -1.0, "bytes": [67]},
                ],
            },
        ],
        "refusal": None,
    }
    alone = chat(server, max_tokens=1, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in alone] == [[]]


def test_prompt_logprobs(server: ServerProcess):
    entries = chat(server, max_tokens=1, prompt_logprobs=0)["prompt_logprobs"]
    assert entries[0] is None
    assert [next(iter(entry)) for entry in entries[1:3]] == [str(i) for i in ids("hi")]


def test_stream(server: ServerProcess):
    events = server.events(URL, {"messages": HI, "max_tokens": 3})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    choices = [event["choices"][0] for event in events]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(set(choice["delta"]) == {"content"} for choice in choices[1:-1])
    assert "".join(choice["delta"]["content"] for choice in choices[:-1]) == "ABC"
    assert choices[-1] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
    }
    assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_stream_of_several_with_usage(server: ServerProcess):
    body = {"messages": HI, "max_tokens": 3, "n": 2, "stream_options": {"include_usage": True}}
    events = server.events(URL, body)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 6
    said = {0: "", 1: ""}
    roles = {0: 0, 1: 0}
    for event in events[:-1]:
        assert event["usage"] is None
        for choice in event["choices"]:
            said[choice["index"]] += choice["delta"].get("content", "")
            roles[choice["index"]] += "role" in choice["delta"]
    assert said == {0: "ABC", 1: "BDF"}
    assert roles == {0: 1, 1: 1}


def test_stream_with_logprobs(server: ServerProcess):
    """Every token has one, those whose text waits because it could begin a stop string included."""
    events = server.events(URL, {"messages": HI, "max_tokens": 4, "logprobs": True, "stop": ["CX"]})
    tokens = [t["token"] for e in events for t in (e["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert tokens == ["A", "B", "C", "D"]


def test_stream_that_goes_on_with_the_last_message(server: ServerProcess):
    body = {"messages": [*HI, {"role": "assistant", "content": "XY"}], "continue_final_message": True, "echo": True}
    events = server.events(URL, body | {"max_tokens": 1})
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "XYZ"


def test_harmless_fields(server: ServerProcess):
    harmless = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "tools": None,
        "tool_choice": "none",
        "functions": [],
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "logit_bias": None,
        "stop": None,
        "seed": None,
        "max_tokens": 2,
    }
    assert content(chat(server, **harmless)) == "AB"
    assert content(chat(server, tools=[{"type": "function"}], tool_choice="none", max_tokens=2)) == "AB"
