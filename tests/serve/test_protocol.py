"""Request bodies: what passes, and how refusals name the field at fault."""

import json
from typing import Any

import pytest

from tenfold.base.errors import RequestError
from tenfold.serve.protocol import (
    HARMLESS,
    UNSUPPORTED,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    RequestModel,
    TokenizeRequest,
    parse_body,
)

HI = {"messages": [{"role": "user", "content": "hi"}]}


def parse(body: dict[str, Any], model: type[RequestModel] = CompletionRequest) -> Any:
    return parse_body(model, json.dumps(body).encode())


def refused(body: dict[str, Any], model: type[RequestModel] = CompletionRequest) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body, model)
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nothing",
        b"\xff\xfe",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a"} {}',
        b'{"prompt": "a",}',
    ],
)
def test_not_json(body: bytes):
    with pytest.raises(RequestError, match="not valid JSON") as caught:
        parse_body(CompletionRequest, body)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("body", [b"[]", b"3", b'"x"', b"null"])
def test_not_an_object(body: bytes):
    with pytest.raises(RequestError, match="must be a JSON object"):
        parse_body(CompletionRequest, body)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "5"),
        ("max_tokens", 5.5),
        ("max_tokens", True),
        ("max_tokens", -1),
        ("max_tokens", 2**31),
        ("n", 0),
        ("n", 129),
        ("best_of", 0),
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", -1),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("seed", 2**64),
        ("seed", 10**400),
        ("stop", ["a"] * 17),
        ("stop", ["a", ""]),
        ("stop", 5),
        ("stop", [None]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", "a"),
        ("stream", 1),
        ("logprobs", 6),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"٣": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "x"}),
        ("logit_bias", {"1": True}),
        ("logit_bias", []),
        ("priority", 2**40),
        ("cache_salt", ""),
        ("model", 3),
        ("prompt", None),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", [1, "a"]),
        ("prompt", [[1], "a"]),
        ("prompt", [1, True]),
        ("prompt", [1.0]),
        ("prompt", [-1]),
        ("prompt", [2**31]),
        ("prompt", {"a": 1}),
    ],
)
def test_wrong_values_are_refused_by_name(field: str, value: Any):
    error = refused({"prompt": "a"} | {field: value})
    assert error.param is not None
    assert error.param.split("[")[0].split(".")[0] == field
    assert field in str(error)


def test_numbers_beyond_all_bounds():
    with pytest.raises(RequestError) as caught:
        parse_body(CompletionRequest, b'{"prompt": "a", "temperature": 1e999}')
    assert caught.value.param == "temperature"


def test_paths_lead_to_the_field():
    error = refused({"messages": [HI["messages"][0], {"role": "pope", "content": "hi"}]}, ChatRequest)
    assert error.param == "messages[1].role"
    assert refused({"prompt": "a", "stop_token_ids": [1, "x"]}).param == "stop_token_ids[1]"
    stream = {"prompt": "a", "stream": True}
    assert refused(stream | {"stream_options": {"x" * 1000: 1}}).param == "stream_options." + "x" * 64


@pytest.mark.parametrize(("model", "missing"), [(CompletionRequest, "prompt"), (ChatRequest, "messages")])
def test_missing_fields(model: type[RequestModel], missing: str):
    error = refused({}, model)
    assert (error.param, error.code) == (missing, "missing_required_parameter")


@pytest.mark.parametrize(("model", "body"), [(CompletionRequest, {"prompt": "a"}), (ChatRequest, HI)])
def test_unknown_fields(model: type[RequestModel], body: dict[str, Any]):
    error = refused(body | {"temprature": 1}, model)
    assert (error.param, error.code) == ("temprature", "unknown_parameter")


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_fields_pass_with_any_value(name: str):
    for value in (None, True, "x", {"a": 1}, [1]):
        parse(HI | {name: value}, ChatRequest)
        parse({"prompt": "a"} | {name: value})


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_fields_pass_only_unused(name: str):
    for value in UNSUPPORTED[name][1]:
        parse(HI | {name: value}, ChatRequest)
    error = refused(HI | {name: ["something"]}, ChatRequest)
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert f"'{name}' is not supported" in str(error)


def test_numbers_do_not_pass_for_booleans_and_back():
    assert refused({"prompt": "a", "use_beam_search": 0}).code == "unsupported_parameter"
    assert refused({"prompt": "a", "length_penalty": True}).code == "unsupported_parameter"


def test_nulls_mean_defaults():
    names = [name for name in CompletionRequest.model_fields if name != "prompt"]
    assert parse({"prompt": "a"} | dict.fromkeys(names)) == parse({"prompt": "a"})
    names = [name for name in ChatRequest.model_fields if name != "messages"]
    assert parse(HI | dict.fromkeys(names), ChatRequest) == parse(HI, ChatRequest)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts(prompt: Any, expected: list):
    assert parse({"prompt": prompt}).prompt == expected


@pytest.mark.parametrize(
    ("stop", "expected"), [("a", ("a",)), (["a", "bc"], ("a", "bc")), (None, ()), ("", ()), ([], ())]
)
def test_stops(stop: Any, expected: tuple):
    assert parse({"prompt": "a", "stop": stop}).stop == expected


def test_logit_bias_has_token_ids_as_strings():
    assert parse({"prompt": "a", "logit_bias": {"15": 2, "7": -0.5}}).logit_bias == {15: 2.0, 7: -0.5}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_fields_that_do_not_go_together(body: dict[str, Any], param: str):
    assert refused({"prompt": "a"} | body).param == param


def test_top_logprobs_need_logprobs():
    assert refused(HI | {"top_logprobs": 3}, ChatRequest).param == "top_logprobs"
    parse(HI | {"top_logprobs": 0}, ChatRequest)
    parse(HI | {"top_logprobs": 3, "logprobs": True}, ChatRequest)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_content_that_is_not_text_is_refused_by_its_kind(kind: str):
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": kind, kind: {}}]}]}
    error = refused(body, ChatRequest)
    assert error.param == "messages"
    assert f'"{kind}"' in str(error)


@pytest.mark.parametrize("content", [3, {"text": "a"}, ["a"], [{"text": "a"}], [{"type": "text"}], [{"type": 1}]])
def test_content_of_a_wrong_form(content: Any):
    error = refused({"messages": [{"role": "user", "content": content}]}, ChatRequest)
    assert error.param == "messages[0].content"


def test_an_answer_can_be_sent_back_as_it_came():
    answer = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    request = parse({"messages": [*HI["messages"], answer, *HI["messages"]]}, ChatRequest)
    assert request.messages[1].for_template() == {"role": "assistant", "content": "yes"}


def test_tokenize_takes_a_prompt_or_messages():
    parse({"prompt": "a"}, TokenizeRequest)
    parse(HI, TokenizeRequest)
    assert refused({}, TokenizeRequest).param == "prompt"
    assert refused(HI | {"prompt": "a"}, TokenizeRequest).param == "prompt"
    assert refused({"tokens": ["a"]}, DetokenizeRequest).param == "tokens[0]"
