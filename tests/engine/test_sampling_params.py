"""What sampling may be asked for, in the forms that users write it, and what is refused."""

import math
from typing import Any

import pytest

from tenfold.base.errors import RequestError
from tenfold.engine.sampling_params import MAX_BIAS_ENTRIES, MAX_N, SamplingParams


@pytest.mark.parametrize(
    ("field", "whole"),
    [
        ("temperature", 0),
        ("temperature", 1),
        ("top_p", 1),
        ("min_p", 0),
        ("repetition_penalty", 2),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("logit_bias", {5: -100}),
    ],
)
def test_whole_numbers_stand_for_floats(field: str, whole: Any):
    params = SamplingParams(**{field: whole})
    as_float = {k: float(v) for k, v in whole.items()} if isinstance(whole, dict) else float(whole)
    assert params == SamplingParams(**{field: as_float})


@pytest.mark.parametrize(
    ("given", "kept"),
    [("ab", ("ab",)), (["a", "bc"], ("a", "bc")), (("a",), ("a",)), ([], ()), ((), ())],
)
def test_stop_is_a_string_or_several(given: Any, kept: tuple[str, ...]):
    assert SamplingParams(stop=given).stop == kept


def test_stop_tokens_are_kept_as_they_were():
    """Whatever becomes of the list that they came in."""
    tokens = [4, 5]
    params = SamplingParams(stop_token_ids=tokens)
    tokens.append(6)
    assert params.stop_token_ids == (4, 5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", MAX_N + 1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -2),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),  # more than max_tokens
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", dict.fromkeys(range(MAX_BIAS_ENTRIES), 0.0)),
    ],
)
def test_what_is_out_of_range_is_refused(field: str, value: Any):
    with pytest.raises(RequestError) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field
    assert field in str(refused.value)
