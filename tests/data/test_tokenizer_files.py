"""Checkpoint directories as Hugging Face's libraries write them, and damaged ones."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tenfold.base.errors import TokenizerError
from tenfold.data.tokenizer import Tokenizer
from tests.data.vocabularies import BOS, EOS, byte_level, llama_2

NEEDS_TRANSFORMERS = importlib.util.find_spec("transformers") is None
HELLO = [{"role": "user", "content": "Hello"}]


def _write(path: Path, **files: Any) -> Path:
    """A checkpoint directory with a byte-level vocabulary and JSON files of these names."""
    byte_level().save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def _token(content: str, **options: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **flags, **options}


class TestSpecialTokens:
    def test_names_in_every_form(self, tmp_path: Path):
        config = {
            "bos_token": {"__type": "AddedToken", **_token(BOS)},
            "eos_token": EOS,
            "pad_token": None,
            "image_token": "<tool>",
            "add_bos_token": False,
        }
        ours = Tokenizer.load(_write(tmp_path, tokenizer_config=config))
        assert ours.special_tokens == {"bos_token": BOS, "eos_token": EOS, "image_token": "<tool>"}
        assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, None)

    @pytest.mark.parametrize("add", [True, False])
    def test_only_the_post_processor_adds_tokens(self, tmp_path: Path, add: bool):
        config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": add, "add_eos_token": add}
        ours = Tokenizer.load(_write(tmp_path, tokenizer_config=config))
        assert ours.encode("a") == [0, *ours.encode("a", add_special_tokens=False)]

    def test_tokens_that_the_vocabulary_lacks_are_added(self, tmp_path: Path):
        config = {
            "pad_token": "<pad>",
            "added_tokens_decoder": {
                "422": {**_token("<new>"), "special": False},
                "0": {**_token(BOS), "special": True},
            },
            "extra_special_tokens": ["<extra>"],
        }
        ours = Tokenizer.load(_write(tmp_path, tokenizer_config=config))
        ids = ours.encode("<new><pad><extra>", add_special_tokens=False)
        assert ids == [422, 423, 424]
        assert (ours.pad_token_id, ours.vocab_size) == (423, 425)
        assert ours.decode(ids) == "<new>"

    def test_older_files_count_without_an_added_tokens_decoder(self, tmp_path: Path):
        directory = _write(
            tmp_path,
            tokenizer_config={"eos_token": BOS},
            special_tokens_map={"eos_token": _token(EOS), "additional_special_tokens": ["<tool>", _token("<more>")]},
            added_tokens={"<added>": 422},
        )
        ours = Tokenizer.load(directory)
        assert ours.special_tokens == {"eos_token": EOS}
        ids = ours.encode("<added><more>", add_special_tokens=False)
        assert ids == [422, 423]
        assert ours.decode(ids) == "<added>"

    def test_older_files_do_not_count_with_one(self, tmp_path: Path):
        directory = _write(
            tmp_path,
            tokenizer_config={"eos_token": EOS, "added_tokens_decoder": {}},
            special_tokens_map={"eos_token": BOS},
            added_tokens={"<added>": 422},
        )
        ours = Tokenizer.load(directory)
        assert (ours.special_tokens, ours.vocab_size) == ({"eos_token": EOS}, 422)

    def test_named_tokens_by_object(self, tmp_path: Path):
        ours = Tokenizer.load(_write(tmp_path, tokenizer_config={"extra_special_tokens": {"tool_token": "<tool>"}}))
        assert ours.special_tokens == {"tool_token": "<tool>"}

    def test_special_tokens_can_be_plain_text(self, tmp_path: Path):
        ours = Tokenizer.load(_write(tmp_path, tokenizer_config={"split_special_tokens": True}))
        assert len(ours.encode(EOS, add_special_tokens=False)) > 1

    def test_the_vocabulary_alone_is_enough(self, tmp_path: Path):
        llama_2().save(str(tmp_path / "tokenizer.json"))
        ours = Tokenizer.load(tmp_path)
        assert ours.decode(ours.encode("the fox")) == "the fox"
        assert (ours.special_tokens, ours.has_chat_template) == ({}, False)


class TestChatTemplates:
    def test_from_the_configuration(self, tmp_path: Path):
        ours = Tokenizer.load(_write(tmp_path, tokenizer_config={"chat_template": "config {{ bos_token }}"}))
        assert ours.apply_chat_template(HELLO) == "config "

    def test_several_in_the_configuration(self, tmp_path: Path):
        templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
        ours = Tokenizer.load(_write(tmp_path, tokenizer_config={"chat_template": templates}))
        assert ours.apply_chat_template(HELLO) == "plain"
        assert ours.apply_chat_template(HELLO, tools=[{}]) == "with tools"

    def test_files_replace_the_configuration(self, tmp_path: Path):
        templates = [{"name": "default", "template": "config"}, {"name": "rag", "template": "config"}]
        directory = _write(tmp_path, tokenizer_config={"chat_template": templates})
        (directory / "chat_template.jinja").write_text("file: é", encoding="utf-8")
        assert Tokenizer.load(directory).apply_chat_template(HELLO) == "file: é"
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tool file")
        ours = Tokenizer.load(directory)
        assert ours.apply_chat_template(HELLO, tools=[{}]) == "tool file"
        with pytest.raises(TokenizerError, match=r"a template of this checkpoint \(it has \['default', 'tool_use'\]\)"):
            Tokenizer.load(directory, chat_template="rag")

    def test_the_user_chooses(self, tmp_path: Path):
        templates = [{"name": "default", "template": "plain"}, {"name": "rag", "template": "ragged"}]
        directory = _write(tmp_path, tokenizer_config={"chat_template": templates})
        own = tmp_path / "own.txt"
        own.write_text("from a file")
        for choice, expected in (("rag", "ragged"), (str(own), "from a file"), ("{{ 1 + 1 }}", "2")):
            assert Tokenizer.load(directory, chat_template=choice).apply_chat_template(HELLO) == expected
        with pytest.raises(TokenizerError, match="neither Jinja source, nor a file"):
            Tokenizer.load(directory, chat_template="typo")
        with pytest.raises(TokenizerError, match="syntax error in line 1"):
            Tokenizer.load(directory, chat_template="{% if %}")

    def test_a_broken_template_that_nobody_uses_is_no_obstacle(self, tmp_path: Path):
        ours = Tokenizer.load(_write(tmp_path, tokenizer_config={"chat_template": "{% if %}"}))
        assert ours.encode("a")
        with pytest.raises(TokenizerError, match="syntax error"):
            ours.apply_chat_template(HELLO)


class TestDamage:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("tokenizer.json", "{", "tokenizer.json cannot be read"),
            ("tokenizer.json", '{"model": {"type": "Quantum"}}', "download it again, or upgrade tokenizers"),
            ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
            ("tokenizer_config.json", "[]", "must hold a JSON object, not list"),
            ("tokenizer_config.json", '{"eos_token": 7}', "has an unexpected form"),
            ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "has an unexpected form"),
            ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "has an unexpected form"),
            ("tokenizer_config.json", '{"chat_template": 7}', "has an unexpected form"),
            ("special_tokens_map.json", "nonsense", "special_tokens_map.json is not valid JSON"),
            ("chat_template.jinja", b"\xff\xfe", "cannot be read as UTF-8 text"),
        ],
    )
    def test_is_named(self, tmp_path: Path, name: str, content: str | bytes, message: str):
        directory = _write(tmp_path)
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(TokenizerError, match=message):
            Tokenizer.load(directory)

    @pytest.mark.skipif(not NEEDS_TRANSFORMERS, reason="transformers is installed")
    def test_another_format_needs_the_extra(self, tmp_path: Path):
        (tmp_path / "tokenizer.model").write_bytes(b"")
        with pytest.raises(TokenizerError, match=r"pip install 'tenfold\[hf\]'"):
            Tokenizer.load(tmp_path)

    @pytest.mark.skipif(NEEDS_TRANSFORMERS, reason="needs the extra tenfold[hf]")
    def test_another_format_is_converted(self, tmp_path: Path):
        byte_level().model.save(str(tmp_path))
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        ours = Tokenizer.load(tmp_path)
        assert ours.special_tokens["eos_token"] == "<|endoftext|>"
        assert ours.decode(ours.encode("hello 🎉")) == "hello 🎉"

    @pytest.mark.skipif(NEEDS_TRANSFORMERS, reason="needs the extra tenfold[hf]")
    def test_an_empty_directory_cannot_be_converted(self, tmp_path: Path):
        with pytest.raises(TokenizerError, match="transformers cannot convert it"):
            Tokenizer.load(tmp_path)
