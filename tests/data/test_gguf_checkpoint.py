"""The built-in model as a GGUF file, made a checkpoint's directory, against the directory that it comes in."""

import json
from pathlib import Path
from typing import Any

import pytest

from tenfold.base import gguf
from tenfold.base.builtin import builtin_model
from tenfold.base.errors import CheckpointError, TokenizerError, UnsupportedModelError
from tenfold.base.ggml_blocks import GGMLType
from tenfold.data.gguf_checkpoint import prepare
from tenfold.data.tokenizer import Tokenizer
from tests.gguf_files import CONFIG, metadata, tensors, write_pico, write_split


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TENFOLD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pico.gguf"
    write_pico(path, GGMLType.BF16)
    return path


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_configuration_is_the_models_own(file: Path) -> None:
    found = read(prepare(file) / "config.json")
    own = CONFIG | {"rope_parameters": {"rope_theta": CONFIG["rope_theta"], "rope_type": "default"}}
    own["rope_parameters"]["partial_rotary_factor"] = 1.0
    del own["rope_theta"], own["torch_dtype"]
    assert {key: found[key] for key in own} == own
    assert read(prepare(file) / "generation_config.json")["eos_token_id"] == [1, 3]


def test_the_tokenizer_is_the_models_own(file: Path) -> None:
    own, found = Tokenizer.load(builtin_model()), Tokenizer.load(prepare(file))
    text = "it's 'LL <|user|>\n\n  x\t日本語 👩\u200d👧 12345 \r\n <|end|>"
    for add in (True, False):
        assert found.encode(text, add_special_tokens=add) == own.encode(text, add_special_tokens=add)
    ids = own.encode(text)
    assert found.decode(ids) == own.decode(ids)
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (0, 1, 2)
    messages = [{"role": "user", "content": "Hello"}]
    assert found.apply_chat_template(messages) == own.apply_chat_template(messages)


def test_weights_stay_where_they_are(file: Path, cache: Path) -> None:
    directory = prepare(file)
    assert directory.parent == cache / "gguf"
    assert (directory / "pico.gguf").readlink() == file
    assert sorted(entry.name for entry in directory.parent.iterdir()) == [".lock", directory.name]


def test_a_relative_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    assert prepare(Path("pico.gguf")) == prepare(file)


def test_a_directory_is_made_once_for_each_content(file: Path) -> None:
    first = prepare(file)
    (first / "mark").touch()
    assert prepare(file) == first
    assert (first / "mark").exists()
    write_pico(file, GGMLType.Q8_0)
    assert prepare(file) != first


def test_an_interrupted_directory_never_appears(tmp_path: Path, cache: Path) -> None:
    gguf.write(tmp_path / "a.gguf", metadata() | {"tokenizer.ggml.pre": "unheard-of"}, tensors(GGMLType.F32))
    with pytest.raises(TokenizerError, match="unheard-of"):
        prepare(tmp_path / "a.gguf")
    assert [entry.name for entry in (cache / "gguf").iterdir()] == [".lock"]


@pytest.mark.parametrize("part", [0, 1])
def test_any_part_of_a_split(tmp_path: Path, part: int) -> None:
    paths = write_split(tmp_path, GGMLType.F16)
    directory = prepare(paths[part])
    assert sorted(path.name for path in directory.glob("*.gguf")) == [path.name for path in paths]
    assert read(directory / "config.json")["num_hidden_layers"] == CONFIG["num_hidden_layers"]
    assert directory == prepare(tmp_path)
    paths[0].unlink()
    with pytest.raises(CheckpointError, match="00001-of-00002"):
        prepare(paths[1])


def test_directories(file: Path) -> None:
    assert prepare(builtin_model()) == builtin_model()
    assert prepare(file.parent) == prepare(file)
    (file.parent / "model.safetensors").touch()
    assert prepare(file.parent) == file.parent
    (file.parent / "model.safetensors").unlink()
    write_pico(file.with_name("other.gguf"), GGMLType.Q8_0)
    with pytest.raises(CheckpointError, match=r"other\.gguf and pico\.gguf; pass one file"):
        prepare(file.parent)


def test_without_its_tokenizer(tmp_path: Path) -> None:
    """Which need not be readable then; what ends an answer is taken from it if it is."""
    write_pico(tmp_path / "a.gguf", GGMLType.Q4_0)
    directory = prepare(tmp_path / "a.gguf", tokenizer=False)
    assert read(directory / "generation_config.json")["eos_token_id"] == [1, 3]
    assert not (directory / "tokenizer.json").exists()
    plain = {key: value for key, value in metadata().items() if not key.startswith("tokenizer.")}
    gguf.write(tmp_path / "b.gguf", plain | {"tokenizer.ggml.model": "no_vocab"}, tensors(GGMLType.Q4_0))
    directory = prepare(tmp_path / "b.gguf", tokenizer=False)
    assert sorted(entry.name for entry in directory.iterdir()) == ["b.gguf", "config.json"]
    with pytest.raises(TokenizerError, match="--tokenizer"):
        prepare(tmp_path / "b.gguf")


def test_what_cannot_be_read_is_named(tmp_path: Path, file: Path) -> None:
    write_pico(tmp_path / "other.gguf", GGMLType.Q8_0, general__architecture="mamba")
    with pytest.raises(UnsupportedModelError, match=r"mamba.*llama"):
        prepare(tmp_path / "other.gguf")
    file.write_bytes(file.read_bytes()[:-100_000])
    with pytest.raises(CheckpointError, match="truncated"):
        prepare(file)
    with pytest.raises(CheckpointError, match="absent"):
        prepare(tmp_path / "absent.gguf")
