"""The built-in model as a GGUF file, made a checkpoint's directory, against the directory that it comes in."""

import json
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest

from tenfold.base import gguf
from tenfold.base.builtin import builtin_model
from tenfold.base.errors import CheckpointError, TokenizerError, UnsupportedModelError
from tenfold.base.ggml_blocks import GGMLType
from tenfold.data import gguf_checkpoint
from tenfold.data.generation_config import read_sampling_defaults
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


def test_sampling_has_the_files_defaults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under the names that gguf, the package, gives them."""
    names = library.Keys.General
    wanted = {
        names.SAMPLING_TEMP: np.float32(0.7),
        names.SAMPLING_TOP_K: np.int32(20),
        names.SAMPLING_TOP_P: np.float32(0.95),
        names.SAMPLING_MIN_P: np.float32(0.05),
        names.SAMPLING_PENALTY_REPEAT: np.float32(1.1),
        names.SAMPLING_MIROSTAT: np.int32(0),
    }
    plain = {key: value for key, value in metadata().items() if not key.startswith("tokenizer.")}
    plain["tokenizer.ggml.model"] = "no_vocab"
    file = tmp_path / "a.gguf"
    gguf.write(file, plain | wanted, tensors(GGMLType.Q4_0))
    assert read_sampling_defaults(prepare(file, tokenizer=False)) == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
    }
    assert not caplog.records
    others = {names.SAMPLING_MIROSTAT: np.int32(2), names.SAMPLING_PENALTY_LAST_N: np.int32(64)}
    gguf.write(file, plain | wanted | others, tensors(GGMLType.Q8_0))
    for _ in range(2):  # also when the directory is there already
        caplog.clear()
        prepare(file, tokenizer=False)
        assert "general.sampling.mirostat, general.sampling.penalty_last_n are not implemented" in caplog.text
    gguf.write(file, plain | wanted | {names.SAMPLING_PENALTY_LAST_N: np.int32(0)}, tensors(GGMLType.F16))
    assert "repetition_penalty" not in read_sampling_defaults(prepare(file, tokenizer=False))
    gguf.write(file, plain | {names.SAMPLING_TOP_K: "many"}, tensors(GGMLType.F32))
    with pytest.raises(CheckpointError, match=r"general\.sampling\.top_k must be a number; it is 'many'"):
        prepare(file, tokenizer=False)


def test_directories_wanted_the_longest_ago_are_removed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_checkpoint, "KEPT", 2)
    files = [file.with_name(f"{name}.gguf") for name in "abc"]
    for path in files:
        path.write_bytes(file.read_bytes())
    a, b = (prepare(path, tokenizer=False) for path in files[:2])
    assert prepare(files[0], tokenizer=False) == a
    c = prepare(files[2], tokenizer=False)
    assert [directory.exists() for directory in (a, b, c)] == [True, False, True]
    assert prepare(files[1], tokenizer=False) == b
    assert [directory.exists() for directory in (a, b, c)] == [False, True, True]
    assert all(path.exists() for path in files)


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
