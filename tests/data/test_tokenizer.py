"""The tokenizer's whole surface, with the `tokenizers` library as the oracle."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.errors import TokenizerError
from tenfold.data.detokenizer import Detokenizer
from tenfold.data.tokenizer import Tokenizer
from tests.data.vocabularies import BOS, BUILDERS, CORPUS, EOS, byte_level, vocabulary

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def _with_templates(**templates: str) -> Tokenizer:
    return Tokenizer(byte_level(), special_tokens={"bos_token": BOS}, chat_templates=templates)


class TestEncode:
    @given(st.text(max_size=40), st.booleans())
    def test_is_the_library(self, text: str, special: bool):
        for kind in ("byte_level", "llama_2", "word_piece"):
            oracle, ours = vocabulary(kind)
            assert ours.encode(text, add_special_tokens=special) == oracle.encode(text, add_special_tokens=special).ids

    def test_post_processor_adds_the_special_tokens(self):
        _, ours = vocabulary("llama_2")
        assert ours.encode("the") == [1, *ours.encode("the", add_special_tokens=False)]

    def test_batch_is_each(self):
        _, ours = vocabulary("byte_level")
        assert ours.encode_batch(CORPUS) == [ours.encode(text) for text in CORPUS]
        assert ours.encode_batch([]) == []

    def test_padding_and_truncation_of_the_file_do_not_count(self):
        backend = byte_level()
        backend.enable_truncation(3)
        backend.enable_padding(length=50)
        oracle, _ = vocabulary("byte_level")
        assert Tokenizer(backend).encode(CORPUS[0]) == oracle.encode(CORPUS[0]).ids

    def test_a_lone_surrogate_is_named(self):
        with pytest.raises(TokenizerError, match=r"lone surrogate \(U\+D83C\) at character 2"):
            vocabulary("byte_level")[1].encode("ab\ud83c")

    def test_text_that_the_vocabulary_cannot_spell(self):
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
        with pytest.raises(TokenizerError, match="cannot spell"):
            Tokenizer(backend).encode("b")


class TestDecode:
    @pytest.mark.parametrize("kind", BUILDERS)
    @given(data=st.data())
    def test_is_the_library(self, kind: str, data: st.DataObject):
        oracle, ours = vocabulary(kind)
        ids = st.integers(0, ours.vocab_size - 1).filter(lambda index: oracle.id_to_token(index) is not None)
        some = data.draw(st.lists(ids, max_size=10))
        skip = data.draw(st.booleans())
        assert ours.decode(some, skip_special_tokens=skip) == oracle.decode(some, skip_special_tokens=skip)

    @pytest.mark.parametrize("bad", [-1, 422, 1 << 40])
    def test_an_unknown_id_is_refused(self, bad: int):
        with pytest.raises(TokenizerError, match=f"{bad} is not in the vocabulary, whose largest id is 421"):
            vocabulary("byte_level")[1].decode([0, bad])

    def test_an_id_in_a_gap_is_refused(self):
        _, ours = vocabulary("word_level")
        assert ours.vocab_size == 10
        with pytest.raises(TokenizerError, match="id 8 is not in the vocabulary"):
            ours.decode([8])


class TestTokens:
    def test_views_of_one_token(self):
        oracle, ours = vocabulary("byte_level")
        (the,) = ours.encode(" the", add_special_tokens=False)[:1]
        assert (ours.piece(the), ours.token_bytes(the)) == (oracle.id_to_token(the), ours.token(the).encode())
        assert ours.piece(the).startswith("Ġ")
        first, _ = ours.encode("ж", add_special_tokens=False)
        assert (ours.token_bytes(first), ours.token(first)) == (b"\xd0", "\ufffd")

    def test_special_tokens(self):
        ours = Tokenizer(byte_level(), special_tokens={"bos_token": BOS, "eos_token": EOS, "unk_token": "<?>"})
        assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, None)
        assert (ours.token(1), ours.token_bytes(1), ours.is_special(1)) == (EOS, EOS.encode(), True)
        (tool,) = ours.encode("<tool>", add_special_tokens=False)
        assert (ours.token(tool), ours.is_special(tool)) == ("<tool>", False)

    @pytest.mark.parametrize("padding", [-1, 422, 1 << 40])
    def test_ids_of_a_padded_output_layer_are_empty(self, padding: int):
        _, ours = vocabulary("byte_level")
        assert (ours.piece(padding), ours.token(padding), ours.token_bytes(padding)) == (None, "", b"")
        assert not ours.is_special(padding)


class TestChat:
    def test_default_and_tool_templates(self):
        ours = _with_templates(default=CHATML, tool_use="{{ tools | length }} tools")
        assert ours.has_chat_template
        expected = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        assert ours.apply_chat_template(HELLO) == expected
        assert ours.apply_chat_template(HELLO, tools=[]) == expected
        assert ours.apply_chat_template(HELLO, tools=[{"name": "f"}]) == "1 tools"

    def test_special_tokens_and_keywords_are_variables(self):
        ours = _with_templates(default="{{ bos_token }}{{ eos_token }}{{ enable_thinking }}")
        assert ours.apply_chat_template(HELLO, enable_thinking=False) == f"{BOS}False"
        assert ours.apply_chat_template(HELLO, bos_token="") == ""

    def test_without_a_template(self):
        ours = _with_templates()
        assert not ours.has_chat_template
        with pytest.raises(TokenizerError, match="no chat template; start the server with --chat-template"):
            ours.apply_chat_template(HELLO)

    def test_without_a_default(self):
        with pytest.raises(TokenizerError, match=r"\['rag', 'tool_use'\] and none is the default"):
            _with_templates(rag="", tool_use="").apply_chat_template(HELLO)


def test_threads_may_share_a_tokenizer():
    ours = Tokenizer(byte_level(), chat_templates={"default": CHATML})
    oracle, _ = vocabulary("byte_level")

    def round_trip(text: str) -> tuple[list[int], str, str, str]:
        ids = ours.encode(text)
        detokenizer = Detokenizer(ours)
        streamed = "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.finish()
        return ids, ours.decode(ids), streamed, ours.apply_chat_template([{"role": "user", "content": text}])

    texts = [f"{text} {number}" for number, text in itertools.product(range(20), CORPUS)]
    with ThreadPoolExecutor(8) as pool:
        for text, (ids, decoded, streamed, prompt) in zip(texts, pool.map(round_trip, texts), strict=True):
            assert ids == oracle.encode(text).ids
            assert decoded == streamed == text
            assert prompt == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_a_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(TokenizerError, match="nowhere is not a directory"):
        Tokenizer.load(tmp_path / "nowhere")
