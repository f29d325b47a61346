"""What of a conversation is learned: by `{% generation %}` blocks, by rendering up to each answer, or not at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.builtin import builtin_model
from tenfold.base.errors import DataError
from tenfold.data.supervision import encode_completion, encode_conversation, find_answers
from tenfold.data.tokenizer import Tokenizer
from tenfold.testing.byte_tokenizer import BOS, BOS_ID, CHAT_TEMPLATE, END_ID, EOS, EOS_ID, byte_tokenizer

MARKED = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(template: str = CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(
        byte_tokenizer(), special_tokens={"bos_token": BOS, "eos_token": EOS}, chat_templates={"default": template}
    )


def turns(*contents: str) -> list[dict[str, object]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def learned(one: Tokenizer, messages: list[dict[str, object]], length: int = 1000) -> str:
    [(ids, mask)] = encode_conversation(one, messages, length)
    return one.decode([token for token, yes in zip(ids, mask, strict=True) if yes], skip_special_tokens=False)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED], ids=["rendered", "marked"])
def test_answers_and_what_ends_them_are_learned(template: str) -> None:
    one = tokenizer(template)
    messages = turns("hi", "hello", "bye", "good-bye")
    assert learned(one, messages) == "hello<|end|>good-bye<|end|>"
    ids, _ = encode_conversation(one, messages, 1000)[0]
    assert ids == one.encode(one.apply_chat_template(messages, add_generation_prompt=False), add_special_tokens=False)
    messages[1]["weight"] = 0
    assert learned(one, messages) == "good-bye<|end|>"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cn"])), min_size=2, max_size=5))
def test_both_ways_agree_on_any_text(contents: list[str]) -> None:
    messages = turns(*contents)
    assert find_answers(tokenizer(), messages) == find_answers(tokenizer(MARKED), messages)


def test_pico_learns_what_its_own_recipe_taught_it() -> None:
    pico = Tokenizer.load(builtin_model())
    assert learned(pico, turns("Who are you?", "I am pico.")) == "I am pico.<|end|>"


def test_templates_that_rewrite_answers_are_refused() -> None:
    one = tokenizer(FORGETFUL)
    assert learned(one, turns("hi", "<think>hm</think>hello")) == "<think>hm</think>hello<|end|>"
    with pytest.raises(DataError, match="renders message 2 otherwise"):
        encode_conversation(one, turns("hi", "<think>hm</think>hello", "bye", "good-bye"), 1000)


def test_conversations_without_something_to_learn() -> None:
    with pytest.raises(DataError, match="no message of the assistant"):
        encode_conversation(tokenizer(), turns("hi"), 1000)
    with pytest.raises(DataError, match="begins with a message of the assistant"):
        encode_conversation(tokenizer(), turns("hi", "hello")[1:], 1000)
    with pytest.raises(DataError, match=r"has the characters"):
        find_answers(tokenizer(MARKED), turns("hi", "\ufdd0"))
    long = turns("x" * 50, "hello")
    assert encode_conversation(tokenizer(), long, 40) == []
    [(ids, mask)] = encode_conversation(tokenizer(), long, 56)
    assert (len(ids), sum(mask)) == (56, 2)


def test_completions_end_with_the_end_of_text() -> None:
    assert encode_completion(tokenizer(), "ab", "c", 10) == [
        ([BOS_ID, *b"abc", EOS_ID], [False, False, False, True, True])
    ]
    assert END_ID not in encode_completion(tokenizer(), "ab", "c", 10)[0][0]
