"""Tokenizers that were written into GGUF metadata and read back, against those that they were made from."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from tenfold.base import gguf
from tenfold.base.builtin import builtin_model
from tenfold.base.errors import TokenizerError
from tenfold.data.gguf_tokenizer import SPLITTERS, GGUFTokenizer, TokenType, build_tokenizer, read_end_token_ids
from tenfold.data.tokenizer import Tokenizer
from tests.data.vocabularies import BOS, CORPUS, EOS, TOOL, byte_level, gemma, llama_2, metadata_of


def texts() -> st.SearchStrategy[str]:
    """Text of all scripts, and of what vocabularies were trained on."""
    words = st.sampled_from(" ".join(CORPUS).split(" "))
    spaced = st.lists(st.one_of(words, st.sampled_from([" ", "\n", "\t", "  ", "'s", "'LL", "12345"]))).map("".join)
    return st.one_of(st.text(max_size=40), spaced, st.lists(words, max_size=12).map(" ".join))


def bpe(**extra: Any) -> dict[str, Any]:
    """The metadata of a small byte-level vocabulary, as GPT-2's."""
    backend = byte_level()
    return metadata_of(backend, model="gpt2", **{"pre": "gpt-2", "bos_token_id": 0, "eos_token_id": 1} | extra)


# --- byte-level BPE -------------------------------------------------------------------------------------------------


@functools.cache
def pico() -> tuple[Tokenizer, GGUFTokenizer]:
    """The built-in model's tokenizer, and the same from a GGUF file."""
    backend = tokenizers.Tokenizer.from_file(str(builtin_model() / "tokenizer.json"))
    settings = json.loads((builtin_model() / "tokenizer_config.json").read_text())
    found = metadata_of(
        backend, model="gpt2", pre="ufakzeka", bos_token_id=0, eos_token_id=1, padding_token_id=2, add_bos_token=True
    )
    own = Tokenizer.load(builtin_model())
    template = settings.get("chat_template") or (builtin_model() / "chat_template.jinja").read_text()
    return own, build_tokenizer(found | {"tokenizer.chat_template": template})


@given(text=texts())
@example(text="it's 'LL <|user|>\n\n  x\t日本語 👩\u200d👧 12345 \r\n <|end|>")
@settings(max_examples=300)
def test_pico_comes_back(text: str) -> None:
    own, read = pico()
    other = read.tokenizer()
    for add in (True, False):
        ids = own.encode(text, add_special_tokens=add)
        assert other.encode(text, add_special_tokens=add) == ids
        for skip in (True, False):
            assert other.decode(ids, skip_special_tokens=skip) == own.decode(ids, skip_special_tokens=skip)


def test_pico_is_whole() -> None:
    own, read = pico()
    other = read.tokenizer()
    assert other.vocab_size == own.vocab_size
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (0, 1, 2)
    assert [other.piece(i) for i in range(own.vocab_size)] == [own.piece(i) for i in range(own.vocab_size)]
    assert [other.is_special(i) for i in range(own.vocab_size)] == [own.is_special(i) for i in range(own.vocab_size)]
    assert read.end_token_ids == (1, 3)  # as its generation_config.json has them
    assert read.add_bos
    messages = [{"role": "user", "content": "Hello"}]
    assert other.apply_chat_template(messages) == own.apply_chat_template(messages)


def test_through_a_file(tmp_path: Path) -> None:
    found = bpe(add_bos_token=True)
    gguf.write(tmp_path / "a.gguf", found, {})
    from_file = build_tokenizer(gguf.open(tmp_path / "a.gguf").metadata).tokenizer()
    from_memory = build_tokenizer(found).tokenizer()
    for text in CORPUS:
        assert from_file.encode(text) == from_memory.encode(text) == byte_level().encode(text).ids


@given(text=texts())
@settings(max_examples=100)
def test_gpt_2_comes_back(text: str) -> None:
    other = gpt_2()
    oracle = byte_level_once()
    ids = oracle.encode(text).ids
    assert other.encode(text) == ids
    assert other.decode(ids, skip_special_tokens=False) == oracle.decode(ids, skip_special_tokens=False)


@functools.cache
def gpt_2() -> Tokenizer:
    return build_tokenizer(bpe(add_bos_token=True)).tokenizer()


@functools.cache
def byte_level_once() -> tokenizers.Tokenizer:
    return byte_level()


TEXT = "It's I'LL don't  12345x²\n\n  naïveCase ...?!/\n (ok)\tδ"
SPLITS = {
    "gpt-2": "It|'s| I|'|LL| don|'t| | 12345|x|²|\n\n | naïveCase| ...?!/|\n| (|ok|)|\t|δ",
    "smollm": "It|'s| I|'|LL| don|'t|  |1|2|3|4|5|x|²|\n\n | naïveCase| ...?!/|\n| (|ok|)|\t|δ",
    "llama-bpe": "It|'s| I|'LL| don|'t| | |123|45|x|²|\n\n| | naïveCase| ...?!/\n| (|ok|)|\tδ",
    "qwen2": "It|'s| I|'LL| don|'t| | |1|2|3|4|5|x|²|\n\n| | naïveCase| ...?!/\n| (|ok|)|\tδ",
    "ufakzeka": "It|'s| I|'LL| don|'t| | |1|2|3|4|5|x|²|\n\n| | naïveCase| ...?!/\n| (|ok|)|\tδ",
    "tekken": "It|'s| I|'LL| don|'t| | |1|2|3|4|5|x|²|\n\n| | naïve|Case| ...?!/\n| (|ok|)|\tδ",
    "gpt-4o": "It's| I'LL| don't| | |123|45|x|²|\n\n| | naïve|Case| ...?!/\n| (|ok|)|\tδ",
    "default": "It|'|s| I|'|LL| don|'|t| | |123|45|x|²|\n\n | naïveCase| |...?!/|\n |(|ok|)|\t|δ",
}
"""How the published patterns split a text, worked out by hand."""


@pytest.mark.parametrize("pre", SPLITS)
def test_words_are_split_as_the_name_says(pre: str) -> None:
    backend = build_tokenizer(bpe(pre=pre)).backend
    spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert "|".join(TEXT[start:stop] for start, stop in spans) == SPLITS[pre]


@pytest.mark.parametrize("pre", SPLITTERS)
def test_every_splitter_keeps_the_text(pre: str) -> None:
    """And Oniguruma understands its patterns."""
    backend = build_tokenizer(bpe(pre=pre)).backend
    for text in (TEXT, *CORPUS):
        composed = backend.normalizer.normalize_str(text) if backend.normalizer else text
        spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(composed)]
        assert "".join(composed[start:stop] for start, stop in spans) == composed


@pytest.mark.parametrize(("pre", "ids"), [("llama-bpe", ["abc"]), ("dbrx", ["ab", "c"])])
def test_whole_words(pre: str, ids: list[str]) -> None:
    """A word that is a token but that no merges reach: Llama 3 takes it, others do not."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*alphabet, "ab", "abc"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": False,
    }
    tokenizer = build_tokenizer(found).tokenizer()
    assert [tokenizer.piece(i) for i in tokenizer.encode("abc")] == ids


def test_combining_characters_are_composed_where_the_model_does() -> None:
    decomposed, composed = "e\u0301", "\u00e9"
    ids = {pre: build_tokenizer(bpe(pre=pre)).tokenizer().encode(decomposed) for pre in ("qwen2", "gpt-2")}
    assert ids["qwen2"] == build_tokenizer(bpe()).tokenizer().encode(composed)
    assert ids["gpt-2"] != ids["qwen2"]


@pytest.mark.parametrize(
    ("extra", "start", "end"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [0], []),
        ({"add_bos_token": True, "add_eos_token": True}, [0], [1]),
        ({"add_eos_token": True}, [], [1]),
        ({"pre": "llama-bpe"}, [0], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
        ({"pre": "tekken"}, [0], []),
    ],
)
def test_what_is_put_around_a_sequence(extra: dict[str, Any], start: list[int], end: list[int]) -> None:
    read = build_tokenizer(bpe(**extra))
    plain = read.tokenizer().encode("dog", add_special_tokens=False)
    assert read.tokenizer().encode("dog") == start + plain + end
    assert read.add_bos == bool(start)


def test_special_and_added_tokens() -> None:
    read = build_tokenizer(bpe())
    tokenizer = read.tokenizer()
    ids = tokenizer.encode(f"{BOS}a{TOOL}日本{EOS}")
    assert [tokenizer.piece(i) for i in ids] == [BOS, "a", TOOL, "日本", EOS]
    assert tokenizer.decode(ids) == f"a{TOOL}日本"
    assert dict(read.special_tokens) == {"bos_token": BOS, "eos_token": EOS}


def test_rows_that_pad_the_embedding_are_no_tokens() -> None:
    found = bpe()
    count = len(found["tokenizer.ggml.tokens"])
    found["tokenizer.ggml.tokens"] = [*found["tokenizer.ggml.tokens"], f"[PAD{count}]", "[PAD7]", ""]
    found["tokenizer.ggml.token_type"] = [*found["tokenizer.ggml.token_type"], TokenType.UNUSED, TokenType.UNUSED, 1]
    tokenizer = build_tokenizer(found).tokenizer()
    assert tokenizer.piece(count) is None
    assert tokenizer.piece(count + 1) == "[PAD7]"
    assert tokenizer.vocab_size == count + 2
    assert tokenizer.encode("The quick") == build_tokenizer(bpe()).tokenizer().encode("The quick")


def test_types_may_lack() -> None:
    """As in old files: then the tokens with a name are the special ones."""
    found = bpe()
    del found["tokenizer.ggml.token_type"]
    tokenizer = build_tokenizer(found).tokenizer()
    assert [tokenizer.is_special(i) for i in range(3)] == [True, True, False]


def test_a_normal_token_stays_normal_when_it_pads() -> None:
    found = bpe()
    pad = found["tokenizer.ggml.tokens"].index("a")
    read = build_tokenizer(found | {"tokenizer.ggml.padding_token_id": pad})
    assert read.special_tokens["pad_token"] == "a"
    assert not read.tokenizer().is_special(pad)


def test_all_ends_are_listed() -> None:
    backend = byte_level()
    backend.add_special_tokens(["<|im_end|>", "<|eom_id|>", "<|x|>"])
    backend.add_tokens([AddedToken("<|endoftext|>", normalized=False)])
    x, eom, im_end = (backend.token_to_id(token) for token in ("<|x|>", "<|eom_id|>", "<|im_end|>"))
    found = metadata_of(backend, model="gpt2", pre="gpt-2", eos_token_id=1, eot_token_id=x, eom_token_id=eom)
    assert build_tokenizer(found).end_token_ids == (1, x, eom, im_end)
    assert read_end_token_ids(found) == (1, x, eom, im_end)
    whole = {"tokenizer.huggingface.json": backend.to_str(), "tokenizer.ggml.eos_token_id": 1}
    assert read_end_token_ids(whole) == build_tokenizer(whole).end_token_ids == (1, im_end, eom)


def test_chat_templates() -> None:
    found = bpe() | {
        "tokenizer.chat_template": "plain {{ messages[0].content }}",
        "tokenizer.chat_templates": ["default", "tool_use"],
        "tokenizer.chat_template.tool_use": "tools {{ messages[0].content }}",
    }
    read = build_tokenizer(found)
    assert set(read.chat_templates) == {"default", "tool_use"}
    messages = [{"role": "user", "content": "x"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert read.tokenizer().apply_chat_template(messages) == "plain x"
    assert read.tokenizer().apply_chat_template(messages, tools=[tool]) == "tools x"
    assert read.tokenizer(chat_template="own {{ messages[0].content }}").apply_chat_template(messages) == "own x"
    assert not build_tokenizer(bpe()).tokenizer().has_chat_template


def test_a_whole_tokenizer_json_is_taken_at_its_word() -> None:
    own = byte_level()
    found = {"tokenizer.huggingface.json": own.to_str(), "tokenizer.ggml.bos_token_id": 0}
    read = build_tokenizer(found | {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.model": "unheard of"})
    assert read.add_bos
    assert read.end_token_ids == (1,)
    assert dict(read.special_tokens) == {"bos_token": BOS, "eos_token": EOS}
    for text in CORPUS:
        assert read.tokenizer().encode(text) == own.encode(text).ids


# --- SentencePiece --------------------------------------------------------------------------------------------------


def sentence_piece(backend: tokenizers.Tokenizer, **extra: Any) -> dict[str, Any]:
    """A vocabulary with byte fallback as SentencePiece's own: scores in the order of training instead of merges."""
    found = metadata_of(backend, model="llama", **{"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | extra)
    merges = found.pop("tokenizer.ggml.merges")
    tokens = found["tokenizer.ggml.tokens"]
    rank = {"".join(merge.split(" ")): float(-i) for i, merge in enumerate(merges)}
    types = found["tokenizer.ggml.token_type"]
    types[0] = TokenType.UNKNOWN
    types[3:259] = TokenType.BYTE
    return found | {"tokenizer.ggml.scores": np.array([rank.get(t, -1e4) for t in tokens], np.float32)}


def join_by_score(text: str, found: dict[str, Any]) -> list[int]:
    """SentencePiece's BPE as the paper has it: again and again, the best pair of neighbours, the leftmost of equals."""
    kinds = found["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(found["tokenizer.ggml.tokens"])}
    scores = {t: found["tokenizer.ggml.scores"][i] for t, i in ids.items() if kinds[i] == TokenType.NORMAL}
    parts = list(text)
    while True:
        pairs = [a + b for a, b in itertools.pairwise(parts)]
        best = max((scores[pair] for pair in pairs if pair in scores), default=None)
        if best is None:
            break
        at = next(i for i, pair in enumerate(pairs) if scores.get(pair) == best)
        parts[at : at + 2] = [pairs[at]]
    bytewise = ([ids[f"<0x{byte:02X}>"] for byte in part.encode()] for part in parts)
    return [i for part, spelled in zip(parts, bytewise, strict=True) for i in ([ids[part]] if part in ids else spelled)]


@functools.cache
def spm(kind: str) -> tuple[dict[str, Any], Tokenizer]:
    found = sentence_piece({"llama_2": llama_2, "gemma": gemma}[kind](), add_space_prefix=kind == "llama_2")
    return found, build_tokenizer(found).tokenizer()


@pytest.mark.parametrize(("kind", "prefix"), [("llama_2", "▁"), ("gemma", "")])
@given(text=texts())
@example(text="")
@example(text=" The  quick\n\n\tfox 日本語 🎉 ")
@settings(max_examples=150)
def test_joined_by_score(kind: str, prefix: str, text: str) -> None:
    found, tokenizer = spm(kind)
    spelled = text.replace(" ", "▁")
    expected = join_by_score((prefix if text else "") + spelled, found)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.encode(text) == [1, *expected]
    # `▁` stands for a space, so that one in the text itself comes back as a space; and a leading space is the prefix
    assert tokenizer.decode(expected) == text.replace("▁", " ")


def test_a_space_behind_every_special_token() -> None:
    found, tokenizer = spm("llama_2")
    ids = tokenizer.encode("fox</s>fox", add_special_tokens=False)
    once = join_by_score("▁fox", found)
    assert ids == [*once, 2, *once]


def test_user_defined_tokens_are_found_first() -> None:
    """Gemma's, with spaces in them: files have them as text, not as SentencePiece spells them."""
    backend = gemma()
    backend.add_tokens([AddedToken("   ", normalized=False), AddedToken("<table>", normalized=False)])
    tokenizer = build_tokenizer(sentence_piece(backend, add_space_prefix=False)).tokenizer()
    ids = tokenizer.encode("a    b<table>", add_special_tokens=False)
    pieces = [tokenizer.piece(i) for i in ids]
    assert pieces[:2] == ["a", "   "]
    assert pieces[-1] == "<table>"
    assert tokenizer.decode(ids) == "a    b<table>"


def test_equal_scores_join_in_the_order_of_ids() -> None:
    found = sentence_piece(llama_2())
    by_rank = build_tokenizer(found).tokenizer()
    del found["tokenizer.ggml.scores"]
    unscored = build_tokenizer(found).tokenizer()
    for text in CORPUS:
        assert unscored.encode(text) == by_rank.encode(text)


def test_phi_3_swallows_spaces_behind_its_special_tokens() -> None:
    backend = llama_2()
    backend.add_special_tokens(["<|user|>", "<|endoftext|>"])
    found = sentence_piece(backend)
    texts = "<|user|>\nfox", "<|user|>fox", "<|endoftext|>\nfox", "<|endoftext|>fox"
    plain = build_tokenizer(found).tokenizer()
    phi = build_tokenizer(found | {"general.architecture": "phi3"}).tokenizer()
    assert len({tuple(plain.encode(text)) for text in texts}) == 4
    assert phi.encode(texts[0]) == phi.encode(texts[1]) == plain.encode(texts[1])
    assert phi.encode(texts[2]) == plain.encode(texts[2])


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "has no text under tokenizer.ggml.model"),
        ({"model": "t5"}, "a tokenizer of the kind 't5', which is not implemented; known are gpt2, llama"),
        (
            {"pre": "brand-new"},
            r"splits text as 'brand-new' \(tokenizer.ggml.pre\), which is not implemented; known are",
        ),
        ({"pre": 3}, "has no text under tokenizer.ggml.pre"),
        ({"tokens": []}, "has no tokens under tokenizer.ggml.tokens"),
        ({"tokens": np.arange(3)}, "tokenizer.ggml.tokens that is not a list of strings"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, "has the token 'a' twice"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type that is not 4.. numbers, one per token"),
        ({"token_type": "types"}, "tokenizer.ggml.token_type that is not"),
        ({"token_type": 7}, "tokenizer.ggml.token_type that is not"),
        ({"merges": ["ab"]}, "has the merge 'ab', which is not a pair"),
        ({"merges": ["nowhere found"]}, "vocabulary is damaged: .*nowhere"),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges that is not a list of strings"),
        ({"bos_token_id": 10**6}, "tokenizer.ggml.bos_token_id = 1000000, which no token has"),
        ({"bos_token_id": -1}, "tokenizer.ggml.bos_token_id = -1, which no token has"),
        ({"eos_token_id": "</s>"}, "tokenizer.ggml.eos_token_id = '</s>', which no token has"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token = 1, which is not a boolean"),
        ({"add_bos_token": True, "bos_token_id": None}, "sets add_bos_token without the id of the token to add"),
        (
            {"add_eos_token": True, "add_bos_token": True, "eos_token_id": None},
            "sets add_bos_token and add_eos_token without the id",
        ),
    ],
)
def test_damage_is_named(change: dict[str, Any], message: str) -> None:
    found = bpe() | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    found = {key: value for key, value in found.items() if value is not None}
    with pytest.raises(TokenizerError, match=message):
        build_tokenizer(found)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "has no text under tokenizer.ggml.model"),
        ({"tokenizer.huggingface.json": "{"}, "tokenizer.huggingface.json cannot be read"),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.scores": [np.nan]},
            "tokenizer.ggml.scores that is not 1 numbers",
        ),
        (
            {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["a" * 1001]},
            "token 0 has 1001 characters",
        ),
        (bpe() | {"tokenizer.chat_templates": ["rag"]}, "has no text under tokenizer.chat_template.rag"),
    ],
    ids=["nothing", "json", "scores", "long", "template"],
)
def test_more_damage_is_named(found: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        build_tokenizer(found)


def anything() -> st.SearchStrategy[Any]:
    """Every kind of value that a file's metadata can hold."""
    numbers = st.one_of(st.integers(-5, 500), st.integers(-(2**63), 2**64 - 1), st.floats())
    words = st.one_of(st.text(max_size=5), st.sampled_from(["a b", "<s>", "[PAD1]", "llama", "gpt2", "qwen2", "{{"]))
    arrays = st.lists(st.integers(0, 7), max_size=6).map(lambda items: np.array(items, np.int32))
    return st.one_of(numbers, words, st.booleans(), st.lists(words, max_size=6), arrays, st.lists(arrays, max_size=2))


@given(model=st.sampled_from(["gpt2", "llama"]), data=st.data())
@settings(max_examples=300)
def test_no_metadata_do_more_than_raise(model: str, data: st.DataObject) -> None:
    found = dict(small_bpe() if model == "gpt2" else spm("llama_2")[0])
    names = [f"tokenizer.ggml.{name}" for name in ("pre", "add_bos_token", "add_eos_token", "eot_token_id")]
    keys = st.sampled_from([*found, *names, "tokenizer.chat_template", "tokenizer.chat_templates"])
    found |= data.draw(st.dictionaries(keys, anything(), min_size=1, max_size=3))
    try:
        tokenizer = build_tokenizer(found).tokenizer()
        tokenizer.decode(tokenizer.encode("The fox. 日本語"))
    except TokenizerError:
        return


@functools.cache
def small_bpe() -> dict[str, Any]:
    return bpe()
