"""Tokens to bytes and text, against the decoders of the `tokenizers` library."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from tenfold.data.decoder import MAX_OPEN_RUN, ByteRun, DecoderKind, TokenDecoder
from tests.data.vocabularies import BUILDERS, vocabulary

LLAMA_2 = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def _byte_tokens(data: bytes) -> list[str]:
    return [f"<0x{byte:02X}>" for byte in data]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("byte_level", DecoderKind.BYTES),
        ("llama_2", DecoderKind.PIECES),
        ("gemma", DecoderKind.PIECES),
        ("unigram", DecoderKind.PIECES),
        ("word_piece", DecoderKind.PIECES),
        ("word_level", DecoderKind.PIECES),
        ("suffix_bpe", DecoderKind.WHOLE),
    ],
)
def test_every_kind_of_checkpoint_is_recognised(kind: str, expected: DecoderKind):
    assert vocabulary(kind)[1].decoder.kind is expected


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 1)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace("é", "e"), decoders.Fuse()]),
        decoders.Sequence([decoders.Metaspace(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
        decoders.Sequence([decoders.WordPiece(), decoders.ByteFallback()]),
        decoders.Replace("a", "b"),
    ],
)
def test_decoders_that_are_not_understood_are_not_guessed_at(decoder: decoders.Decoder):
    assert TokenDecoder(decoder).kind is DecoderKind.WHOLE


def test_nested_sequences_are_looked_into():
    nested = decoders.Sequence([decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])])
    assert TokenDecoder(nested).kind is DecoderKind.PIECES
    assert TokenDecoder(decoders.Sequence([decoders.ByteLevel()])).kind is DecoderKind.BYTES


@given(st.characters(exclude_categories=["Cs"]))
def test_byte_alphabet_is_the_pre_tokenizers(char: str):
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((spelled, _),) = pre_tokenizer.pre_tokenize_str(char)
    assert TokenDecoder(decoders.ByteLevel()).token_bytes(spelled) == char.encode()


def test_byte_alphabet_covers_every_byte():
    decoder = TokenDecoder(decoders.ByteLevel())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert sorted(decoder.token_bytes(char) for char in alphabet) == [bytes((byte,)) for byte in range(256)]
    # Bytes that UTF-8 never contains, where no text can confirm the alphabet.
    assert decoder.token_bytes("ÀÁõÿ") == b"\xc0\xc1\xf5\xff"


@pytest.mark.parametrize(
    ("decoder", "token", "expected"),
    [
        (decoders.ByteLevel(), "Ġthe", b" the"),
        (decoders.ByteLevel(), "<|im end|>", b"<|im end|>"),
        (decoders.ByteLevel(), "日本", "日本".encode()),
        (LLAMA_2, "▁the", b" the"),
        (LLAMA_2, "<0x0A>", b"\n"),
        (LLAMA_2, "<0xe4>", b"\xe4"),
        (LLAMA_2, "<0xZZ>", b"<0xZZ>"),
        (LLAMA_2, "</s>", b"</s>"),
        (decoders.Metaspace(), "▁the", b" the"),
        (decoders.Metaspace(), "<0x0A>", b"<0x0A>"),
        (decoders.WordPiece(), "the", b" the"),
        (decoders.WordPiece(), "##ing", b"ing"),
        (None, "the", b" the"),
        (decoders.CTC(), "the", b"the"),
    ],
)
def test_token_bytes(decoder: decoders.Decoder | None, token: str, expected: bytes):
    assert TokenDecoder(decoder).token_bytes(token) == expected


@pytest.mark.parametrize("kind", BUILDERS)
def test_bytes_of_the_tokens_make_up_the_text(kind: str):
    oracle, ours = vocabulary(kind)
    if ours.decoder.kind is DecoderKind.WHOLE:
        return
    ids = oracle.encode("the quick brown fox 日本", add_special_tokens=False).ids
    whole = b"".join(ours.token_bytes(token_id) for token_id in ids).decode()
    # Only the space before the first word is the whole text's business.
    assert whole.removeprefix(" ") == oracle.decode(ids).removeprefix(" ")


class TestByteRun:
    @given(st.binary(max_size=MAX_OPEN_RUN - 1))
    def test_is_the_byte_fallback_decoder(self, data: bytes):
        run = ByteRun()
        text = "".join(map(run.push, data)) + run.end()
        assert text == decoders.ByteFallback().decode(_byte_tokens(data))

    @given(st.text(min_size=1))
    def test_valid_text_comes_out_whole_and_bounded(self, text: str):
        run, shown, held = ByteRun(), "", 0
        for byte in text.encode():
            new = run.push(byte)
            shown += new
            held = 0 if new else held + 1
            assert held <= MAX_OPEN_RUN + 2
        assert shown + run.end() == text

    def test_breaks_once_and_then_shows_every_byte(self):
        run = ByteRun()
        assert [run.push(byte) for byte in b"ab\xffc"] == ["", "", "\ufffd" * 3, "\ufffd"]
        assert (run.peek(), run.end()) == ("", "")
        assert (run.push(0x61), run.peek(), run.end()) == ("", "a", "a")

    def test_a_long_run_ends_at_a_character(self):
        run = ByteRun()
        pushed = [run.push(byte) for byte in ("é" * 40).encode() + b"\xff"]
        assert [(index, text) for index, text in enumerate(pushed) if text] == [
            (MAX_OPEN_RUN - 1, "é" * 32),
            (80, "\ufffd" * 17),
        ]


def test_long_runs_decode_as_the_library_does_unless_they_break_late():
    ours, library = TokenDecoder(LLAMA_2), LLAMA_2
    valid = ["x", *_byte_tokens(("é" * 100).encode()), "y"]
    assert ours.text(valid) == library.decode(valid) == "x" + "é" * 100 + "y"
    early = ["x", *_byte_tokens(b"a\xff" + b"b" * 100), "y"]
    assert ours.text(early) == library.decode(early)
    late = ["x", *_byte_tokens(b"a" * MAX_OPEN_RUN + b"\xff"), "y"]
    assert ours.text(late) == "x" + "a" * MAX_OPEN_RUN + "\ufffdy"
    assert library.decode(late) == "x" + "\ufffd" * (MAX_OPEN_RUN + 1) + "y"
