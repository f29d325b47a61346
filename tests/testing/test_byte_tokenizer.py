"""The byte tokenizer is what it says, read back by the project's own tokenizer from the files that it writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.errors import TokenizerError
from tenfold.data import Tokenizer
from tenfold.testing.byte_tokenizer import SPECIAL_TOKENS, VOCAB_SIZE, byte_tokenizer, write_byte_tokenizer

BACKEND = byte_tokenizer()


@given(st.text())
def test_ids_are_the_bytes_of_the_text(text):
    assert BACKEND.encode(text, add_special_tokens=False).ids == list(text.encode())
    assert BACKEND.decode(list(text.encode())) == text


def test_special_tokens_follow_the_bytes():
    assert [BACKEND.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(256, VOCAB_SIZE))
    assert BACKEND.get_vocab_size() == VOCAB_SIZE
    assert BACKEND.encode("a<|end|>").ids == [256, ord("a"), 258]
    assert BACKEND.decode([256, ord("a"), 258]) == "a"


def test_files_load_with_their_chat_template(tmp_path):
    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (256, 257, VOCAB_SIZE)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|bos|><|user|>Hi<|end|><|assistant|>"
    assert tokenizer.encode(text, add_special_tokens=False) == [256, 260, *b"Hi", 258, 261]
    with pytest.raises(TokenizerError, match="not judge"):
        tokenizer.apply_chat_template([{"role": "judge", "content": "Hi"}])
