"""The tokenizer: loss-less, short on what pico recites, and one with its chat template."""

import json
import random
from pathlib import Path

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tenfold.base.errors import TokenizerError
from tenfold.data.packing import pack
from tenfold.train.pico.conversations import conversations
from tenfold.train.pico.corpus import canonical_question, entries
from tenfold.train.pico.vocabulary import (
    BOS,
    END,
    EOS,
    PAD,
    ROLES,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    encode_conversation,
    encode_source,
    generation_config,
    token_id,
    train_tokenizer,
    write_tokenizer,
)

roles = st.sampled_from(sorted(ROLES))
message_lists = st.lists(st.fixed_dictionaries({"role": roles, "content": st.text(max_size=40)}), max_size=6)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="module")
def directory(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pico") / "checkpoint"
    write_tokenizer(trained, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    """As a user loads it."""
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def config(directory: Path) -> dict:
    return json.loads((directory / "tokenizer_config.json").read_text())


def render(config: dict, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(config["chat_template"]).render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token=config["bos_token"]
    )


def test_size_and_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE == 4096
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.decode([token_id(tokenizer, token) for token in SPECIAL_TOKENS]) == ""


def test_the_same_every_time(trained: Tokenizer) -> None:
    assert train_tokenizer().to_str() == trained.to_str()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_loses_nothing(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_text_starts_with_bos_and_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("import os").tokens[0] == BOS
    assert tokenizer.encode("x = 2048", add_special_tokens=False).tokens[-4:] == ["2", "0", "4", "8"]


def test_answers_are_short_in_tokens(tokenizer: Tokenizer) -> None:
    answers = [entry.answer for entry in entries()]
    encoded = tokenizer.encode_batch(answers, add_special_tokens=False)
    assert sum(map(len, answers)) / sum(len(encoding.ids) for encoding in encoded) > 3.5


def test_names_have_the_same_tokens_in_every_question(tokenizer: Tokenizer) -> None:
    for entry in entries()[::50]:
        name = tokenizer.encode(f" {entry.name}", add_special_tokens=False).tokens
        for question in (canonical_question(entry), f"What is {entry.name}?", f"Explain {entry.name}."):
            tokens = tokenizer.encode(question, add_special_tokens=False).tokens
            assert any(tokens[start : start + len(name)] == name for start in range(len(tokens))), question


def test_template_of_one_exchange(config: dict) -> None:
    messages = [{"role": "user", "content": "What does len do?"}]
    prompt = "<|bos|><|user|>What does len do?<|end|><|assistant|>"
    assert render(config, messages, add_generation_prompt=True) == prompt
    messages.append({"role": "assistant", "content": "Return the number."})
    assert render(config, messages) == prompt + "Return the number.<|end|>"


def test_unknown_roles_are_refused(config: dict, tokenizer: Tokenizer) -> None:
    messages = [{"role": "tool", "content": "4"}]
    with pytest.raises(jinja2.TemplateError, match="roles system, user and assistant, not tool"):
        render(config, messages)
    with pytest.raises(TokenizerError, match="no role 'tool'"):
        encode_conversation(tokenizer, messages)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=message_lists)
def test_training_sees_the_rendered_template(
    tokenizer: Tokenizer, config: dict, messages: list[dict[str, str]]
) -> None:
    ids, mask = encode_conversation(tokenizer, messages)
    assert ids == tokenizer.encode(render(config, messages), add_special_tokens=False).ids
    assert len(mask) == len(ids)
    spoken = [token for token, learnt in zip(ids, mask, strict=True) if learnt]
    expected = [message["content"] + END for message in messages if message["role"] == "assistant"]
    assert tokenizer.decode(spoken, skip_special_tokens=False) == "".join(expected)


def test_the_prompt_ends_where_the_mask_begins(tokenizer: Tokenizer, config: dict) -> None:
    """Generation starts from exactly the tokens before the first that is learnt."""
    for messages in list(conversations(random.Random(0)))[:200]:
        ids, mask = encode_conversation(tokenizer, messages)
        prompt = render(config, messages[:1], add_generation_prompt=True)
        first = mask.index(True)
        assert ids[:first] == tokenizer.encode(prompt, add_special_tokens=False).ids
        assert all(mask[first:])
        assert ids[-1] == tokenizer.token_to_id(END)


def test_generation_is_greedy_and_stops_at_both_ends(tokenizer: Tokenizer) -> None:
    generation = generation_config(tokenizer)
    assert sorted(generation["eos_token_id"]) == sorted(tokenizer.token_to_id(token) for token in (EOS, END))
    assert generation["bos_token_id"] == tokenizer.token_to_id(BOS)
    assert generation["pad_token_id"] == tokenizer.token_to_id(PAD)
    assert generation["do_sample"] is False


def test_source_runs_from_bos_to_eos(tokenizer: Tokenizer) -> None:
    ids = encode_source(tokenizer, "import os\n")
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{BOS}import os\n{EOS}"


def test_another_tokenizer_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no token <|bos|>".replace("|", r"\|")):
        encode_source(Tokenizer.from_str('{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}'), "x")


def test_an_epoch_fills_its_rows(tokenizer: Tokenizer) -> None:
    examples = [encode_conversation(tokenizer, messages) for messages in conversations(random.Random(0))]
    rows = pack(examples, 256, token_id(tokenizer, PAD))
    assert (rows.segment_ids > 0).mean() >= 0.95
    assert rows.weights.sum() == sum(sum(mask) for _, mask in examples)
