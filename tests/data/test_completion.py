"""The text of a completion against `decode` and `find` on the whole."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.data.completion import CompletionText, TextDelta
from tests.data.vocabularies import BOS, BUILDERS, EOS, vocabulary

WORDS = st.text(st.sampled_from("the quick fox\n,.é日🎉"), min_size=1, max_size=30)


def push_in_parts(text: CompletionText, ids: list[int], cuts: list[int], *, stop_token: bool = False) -> TextDelta:
    """All deltas of a completion as one."""
    bounds = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    deltas = [
        text.push(ids[a:b], final=i == len(bounds) - 2, stop_token=stop_token and i == len(bounds) - 2)
        for i, (a, b) in enumerate(pairwise(bounds))
    ]
    return TextDelta(
        "".join(delta.text for delta in deltas),
        deltas[-1].stop,
        sum(delta.num_tokens for delta in deltas),
        tuple(offset for delta in deltas for offset in delta.offsets),
    )


@pytest.mark.parametrize("kind", BUILDERS)
@settings(max_examples=30)
@given(words=WORDS, cuts=st.lists(st.integers(0, 30)))
def test_text_is_the_decoding_of_the_whole(kind: str, words: str, cuts: list[int]):
    oracle, ours = vocabulary(kind)
    ids = oracle.encode(words, add_special_tokens=False).ids
    delta = push_in_parts(CompletionText(ours), ids, cuts)
    assert delta.text == oracle.decode(ids)
    assert (delta.stop, delta.num_tokens, len(delta.offsets)) == (None, len(ids), len(ids))


@given(words=WORDS, cuts=st.lists(st.integers(0, 30)), data=st.data(), include=st.booleans())
def test_a_stop_string_ends_it_wherever_it_is_cut(words: str, cuts: list[int], data: st.DataObject, include: bool):
    oracle, ours = vocabulary("byte_level")
    ids = oracle.encode(words, add_special_tokens=False).ids
    start = data.draw(st.integers(0, len(words) - 1))
    stop = words[start : start + data.draw(st.integers(1, 4))]
    delta = push_in_parts(CompletionText(ours, stop=(stop,), include_stop=include), ids, cuts)
    found = words.index(stop)
    assert delta.text == words[: found + (len(stop) if include else 0)]
    assert delta.stop == stop
    # The fewest tokens whose bytes have the whole stop string.
    spelled = [len(b"".join(ours.token_bytes(i) for i in ids[:n])) for n in range(len(ids) + 1)]
    end = len(words[: found + len(stop)].encode())
    assert delta.num_tokens == len(delta.offsets) == next(n for n, length in enumerate(spelled) if length >= end)


@given(words=WORDS, cuts=st.lists(st.integers(0, 30)))
def test_offsets_say_where_the_text_of_each_token_begins(words: str, cuts: list[int]):
    oracle, ours = vocabulary("byte_level")
    ids = oracle.encode(words, add_special_tokens=False).ids
    delta = push_in_parts(CompletionText(ours), ids, cuts)
    before = b""
    for token_id, offset in zip(ids, delta.offsets, strict=True):
        assert offset == len(before.decode("utf-8", "ignore"))
        before += ours.token_bytes(token_id)


def test_nothing_is_added_after_a_stop_string():
    oracle, ours = vocabulary("byte_level")
    text = CompletionText(ours, stop=("fox",))
    first = text.push(oracle.encode("a fox!", add_special_tokens=False).ids, final=False)
    assert (first.text, first.stop) == ("a ", "fox")
    assert text.push([40, 41], final=True) == TextDelta("", "fox", 0, ())


def test_what_could_begin_a_stop_string_waits_and_comes_at_the_end():
    oracle, ours = vocabulary("byte_level")
    text = CompletionText(ours, stop=("fox",))
    assert text.push(oracle.encode("a fo", add_special_tokens=False).ids, final=False).text == "a "
    assert text.push([], final=True).text == "fo"


@pytest.mark.parametrize(("include", "expected"), [(False, "fox"), (True, "fox!")])
def test_the_text_of_a_stop_token_belongs_to_it_only_if_asked_for(include: bool, expected: str):
    oracle, ours = vocabulary("byte_level")
    ids = oracle.encode("fox!", add_special_tokens=False).ids
    assert oracle.id_to_token(ids[-1]) == "!"
    delta = push_in_parts(CompletionText(ours, include_stop=include), ids, [1], stop_token=True)
    assert (delta.text, delta.num_tokens) == (expected, len(ids))


@pytest.mark.parametrize(("skip", "expected"), [(True, "fox"), (False, f"{BOS}fox")])
def test_special_tokens(skip: bool, expected: str):
    oracle, ours = vocabulary("byte_level")
    special = [oracle.token_to_id(BOS), *oracle.encode("fox", add_special_tokens=False).ids, oracle.token_to_id(EOS)]
    delta = CompletionText(ours, skip_special_tokens=skip).push(special, final=True, stop_token=True)
    assert delta.text == expected


@given(cuts=st.lists(st.integers(0, 12)), min_tokens=st.integers(0, 12))
def test_stop_strings_wait_for_min_tokens(cuts: list[int], min_tokens: int):
    oracle, ours = vocabulary("byte_level")
    ids = [oracle.token_to_id("x"), oracle.token_to_id("-")] * 6
    delta = push_in_parts(CompletionText(ours, stop=("x",), min_tokens=min_tokens), ids, cuts)
    kept = next((n for n in range(min_tokens, 12) if n % 2 == 0), None)
    assert delta.text == ("x-" * 6)[:kept]
    assert delta.stop == (None if kept is None else "x")


def test_the_prompt_decides_about_the_first_space():
    oracle, ours = vocabulary("llama_2")
    prompt = oracle.encode("The quick", add_special_tokens=False).ids
    fox = oracle.encode("brown", add_special_tokens=False).ids
    assert CompletionText(ours).push(fox, final=True).text == "brown"
    assert CompletionText(ours, prompt_token_ids=prompt).push(fox, final=True).text == " brown"
