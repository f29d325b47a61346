"""/v1/completions over a counting engine: "abc" goes on as "defg..." (see `letters`)."""

import pytest

from tests.serve.conftest import ServerProcess
from tests.serve.letters import BOS, END, ids

URL = "/v1/completions"


def complete(server: ServerProcess, **body: object) -> dict:
    response = server.post(URL, {"model": "letters"} | body)
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: dict) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def test_shape(server: ServerProcess):
    answer = complete(server, prompt="abc", max_tokens=4)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1.7e9
    assert answer == {
        "object": "text_completion",
        "model": "letters",
        "choices": [{"index": 0, "text": "defg", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 4,  # with the begin token
            "completion_tokens": 4,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_sixteen_tokens_by_default(server: ServerProcess):
    assert texts(complete(server, prompt="a")) == ["bcdefghijklmnopq"]


@pytest.mark.parametrize(
    ("prompt", "expected", "prompt_tokens"),
    [
        ("abc", ["de"], 4),
        (["abc", "kl", "A"], ["de", "mn", "BC"], 4 + 3 + 2),
        (ids("abc"), ["de"], 3),
        ([ids("abc"), ids("KL")], ["de", "MN"], 5),
    ],
)
def test_prompts(server: ServerProcess, prompt: object, expected: list[str], prompt_tokens: int):
    answer = complete(server, prompt=prompt, max_tokens=2)
    assert texts(answer) == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == prompt_tokens
    assert answer["usage"]["completion_tokens"] == 2 * len(expected)


def test_special_tokens_are_added_unless_they_are_not_wanted(server: ServerProcess):
    assert complete(server, prompt="abc", add_special_tokens=False)["usage"]["prompt_tokens"] == 3


def test_n_completions_of_each_prompt(server: ServerProcess):
    # The counting engine's completion i goes on in steps of i + 1.
    answer = complete(server, prompt=["abc", "A"], n=2, max_tokens=3)
    assert texts(answer) == ["def", "egi", "BCD", "CEG"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


def test_best_of_counts_every_token_and_returns_n(server: ServerProcess):
    answer = complete(server, prompt="abc", n=1, best_of=3, max_tokens=3)
    assert len(answer["choices"]) == 1
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 9


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [("fg", "de", "fg"), (["x", "h"], "defg", "h"), (["gh", "fghi"], "de", "fghi"), ("fg\n", "defghi", None)],
)
def test_stop_strings(server: ServerProcess, stop: object, text: str, reason: str | None):
    choice = complete(server, prompt="abc", max_tokens=6, stop=stop)["choices"][0]
    assert choice["text"] == text
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop" if reason else "length", reason)


def test_a_stop_string_can_be_kept(server: ServerProcess):
    answer = complete(server, prompt="abc", stop="fg", include_stop_str_in_output=True)
    assert texts(answer) == ["defg"]
    assert answer["usage"]["completion_tokens"] == 4


def test_a_stop_string_ends_one_of_several(server: ServerProcess):
    answer = complete(server, prompt="abc", n=2, max_tokens=5, stop="f")
    assert texts(answer) == ["de", "egikm"]


def test_stop_tokens(server: ServerProcess):
    choice = complete(server, prompt="abc", stop_token_ids=ids("g"))["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("def", "stop", ids("g")[0])
    kept = complete(server, prompt="abc", stop_token_ids=ids("g"), include_stop_str_in_output=True)
    assert texts(kept) == ["defg"]


def test_min_tokens(server: ServerProcess):
    assert texts(complete(server, prompt="abc", stop_token_ids=ids("dh"), min_tokens=3)) == ["defg"]
    assert texts(complete(server, prompt="abc", stop=["d", "h"], min_tokens=3)) == ["defg"]


def test_end_tokens(server: ServerProcess):
    # The begin token is followed by the end token.
    choice = complete(server, prompt=[BOS])["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    going_on = complete(server, prompt=[BOS], ignore_eos=True, max_tokens=6)
    assert texts(going_on) == ["AB"]
    shown = complete(server, prompt=[BOS], ignore_eos=True, max_tokens=6, skip_special_tokens=False)
    assert texts(shown) == ["<|end|><|user|><|system|><|assistant|>AB"]


def test_logprobs(server: ServerProcess):
    # The scripted engine gives every token -0.5, and names it and the one after it as the likeliest.
    logprobs = complete(server, prompt="abc", max_tokens=3, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["d", "e", "f"],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "top_logprobs": [{"d": -0.5, "e": -1.0}, {"e": -0.5, "f": -1.0}, {"f": -0.5, "g": -1.0}],
        "text_offset": [0, 1, 2],
    }
    none = complete(server, prompt="abc", max_tokens=1, logprobs=0)["choices"][0]["logprobs"]
    assert none["top_logprobs"] == [{"d": -0.5}]


def test_echo(server: ServerProcess):
    assert texts(complete(server, prompt=["abc", "A"], max_tokens=2, echo=True)) == ["abcde", "ABC"]
    assert texts(complete(server, prompt=ids("abc"), max_tokens=2, echo=True)) == ["abcde"]


def test_echo_with_logprobs_scores_the_prompt(server: ServerProcess):
    choice = complete(server, prompt="ab", max_tokens=1, logprobs=1, echo=True)["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["<|bos|>", "a", "b", "c"],
        "token_logprobs": [None, -0.5, -0.5, -0.5],
        "top_logprobs": [None, {"a": -0.5}, {"b": -0.5}, {"c": -0.5}],
        "text_offset": [0, 0, 1, 2],
    }


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_but_the_prompts_own(server: ServerProcess, stream: bool):
    """How evaluation harnesses score a text: echo, logprobs and max_tokens 0."""
    body = {"prompt": "ab", "max_tokens": 0, "logprobs": 1, "echo": True}
    if stream:
        events = server.events(URL, body | {"stream_options": {"include_usage": True}})
        choices, usage = [event["choices"][0] for event in events[:-1]], events[-1]["usage"]
        assert [choice["finish_reason"] for choice in choices] == [None, "length"]
        choice = choices[0]
    else:
        answer = complete(server, **body)
        choice, usage = answer["choices"][0], answer["usage"]
        assert choice["finish_reason"] == "length"
    assert choice["text"] == "ab"
    assert choice["logprobs"]["tokens"] == ["<|bos|>", "a", "b"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)


def test_prompt_logprobs(server: ServerProcess):
    choice = complete(server, prompt="a", max_tokens=1, prompt_logprobs=2)["choices"][0]
    a, b = (str(i) for i in ids("ab"))
    assert choice["prompt_logprobs"] == [
        None,
        {
            a: {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            b: {"logprob": -1.0, "rank": 2, "decoded_token": "b"},
        },
    ]


def test_stream_is_the_whole_in_pieces(server: ServerProcess):
    events = server.events(URL, {"prompt": "abc", "max_tokens": 5})
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert all("usage" not in event for event in events)
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == "defgh"
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert choices[-1]["text"] == ""


def test_stream_of_several(server: ServerProcess):
    events = server.events(URL, {"prompt": ["abc", "A"], "n": 2, "max_tokens": 3, "echo": True})
    found = dict.fromkeys(range(4), "")
    for event in events:
        for choice in event["choices"]:
            found[choice["index"]] += choice["text"]
    assert found == {0: "abcdef", 1: "abcegi", 2: "ABCD", 3: "ACEG"}


def test_stream_with_logprobs_and_held_back_text(server: ServerProcess):
    """ "f" could begin the stop string "fh", so its text waits; its log-probability need not."""
    events = server.events(URL, {"prompt": "abc", "max_tokens": 3, "logprobs": 0, "stop": "fh", "echo": True})
    tokens = [token for event in events for token in (event["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    assert tokens == ["<|bos|>", "a", "b", "c", "d", "e", "f"]
    assert "".join(event["choices"][0]["text"] for event in events) == "abcdef"


def test_stream_usage(server: ServerProcess):
    events = server.events(URL, {"prompt": "abc", "max_tokens": 3, "stream_options": {"include_usage": True}})
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["total_tokens"] == 7
    options = {"include_usage": True, "continuous_usage_stats": True}
    running = server.events(URL, {"prompt": "abc", "max_tokens": 3, "stream_options": options})
    totals = [event["usage"]["completion_tokens"] for event in running]
    assert totals == sorted(totals)
    assert totals[-1] == 3


def test_bytes_that_are_not_a_character(server: ServerProcess):
    """Past the letters the engine counts through raw bytes; most alone are not UTF-8."""
    last = 260
    choice = complete(server, prompt=[last - 3], max_tokens=3, logprobs=1)["choices"][0]
    spelled = choice["logprobs"]["tokens"]
    assert all(token.startswith("bytes:\\x") for token in spelled)
    assert len(set(spelled)) == 3
    assert choice["text"] == "\ufffd" * 3


@pytest.mark.parametrize("end", [END, 0])
def test_context_end(server: ServerProcess, end: int):
    prompt = [*ids("a") * 4095, end + 5]
    response = server.post(URL, {"prompt": [*prompt, 7]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
