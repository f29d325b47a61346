"""Files and directories appear whole or not at all."""

import stat
from pathlib import Path

import pytest

from tenfold.base.errors import CheckpointError
from tenfold.base.files import (
    CHECKPOINT_FILES,
    atomic_directory,
    atomic_write,
    find_gguf,
    gguf_pattern,
    matches,
    no_safetensors,
)


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    (tmp_path / "plain-dir").mkdir()
    with atomic_write(tmp_path / "a"):
        pass
    with atomic_directory(tmp_path / "d"):
        pass

    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert mode("a") == mode("plain")
    assert mode("d") == mode("plain-dir")


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "d"
    with atomic_directory(path) as staging:
        (staging / "x").touch()
        assert not path.exists()
    assert names(path) == ["x"]
    assert names(path.parent) == ["d"]


def test_a_failed_directory_never_appears(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), atomic_directory(tmp_path / "d") as staging:
        (staging / "x").touch()
        raise OSError("disk full")
    assert names(tmp_path) == []


def test_files_move_into_an_existing_directory(tmp_path: Path) -> None:
    path = tmp_path / "d"
    path.mkdir()
    for old in ("w1.bin", "w2.bin", "key.json", "kept.txt"):
        (path / old).write_text("old")
    with atomic_directory(path, replaces=("*.bin",), last=("index.json", "key.json")) as staging:
        for new in ("w1.bin", "key.json"):
            (staging / new).write_text("new")
        assert names(path) == ["kept.txt", "key.json", "w1.bin", "w2.bin"]
    assert {entry.name: entry.read_text() for entry in path.iterdir()} == {
        "w1.bin": "new",
        "key.json": "new",
        "kept.txt": "old",
    }
    assert names(tmp_path) == ["d"]


def test_an_interrupted_move_leaves_no_valid_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d"
    path.mkdir()
    for old in ("w1.bin", "key.json"):
        (path / old).write_text("old")
    moved: list[str] = []
    replace = Path.replace

    def fail_on_the_second(source: Path, target: Path) -> Path:
        if moved:
            raise OSError("killed")
        moved.append(target.name)
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", fail_on_the_second)
    with (
        pytest.raises(OSError, match="killed"),
        atomic_directory(path, replaces=("*.bin",), last=("key.json",)) as staging,
    ):
        for new in ("key.json", "w1.bin"):
            (staging / new).write_text("new")
    assert names(path) == moved == ["w1.bin"]


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "vocab.json",
        "merges.txt",
    ],
)
def test_what_a_checkpoint_needs_is_taken(name: str) -> None:
    assert matches(name, CHECKPOINT_FILES)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "README.md", "modeling_x.py", "training_args.bin"])
def test_what_it_does_not_need_or_could_run_code_is_not(name: str) -> None:
    assert not matches(name, CHECKPOINT_FILES)


def test_the_advice_for_missing_weights_depends_on_the_files() -> None:
    assert "convert" not in str(no_safetensors("m", ["config.json"])).lower()
    message = str(no_safetensors("org/m", ["pytorch_model-1.bin", "pytorch_model-2.bin", "config.json"]))
    assert "pytorch_model-1.bin and 1 more" in message
    assert "from_pretrained('org/m').save_pretrained(DIRECTORY)" in message
    message = str(no_safetensors("org/m", ["b.gguf", "a.gguf", "pytorch_model.bin"]))
    assert "a.gguf and 1 more" in message
    assert "Name one GGUF file" in message


def test_the_gguf_files_of_one_model(tmp_path: Path) -> None:
    assert gguf_pattern("a[1].gguf") == "a[[]1].gguf"
    assert gguf_pattern("a[1]-00002-of-00003.gguf") == "a[[]1]-?????-of-00003.gguf"
    assert find_gguf(tmp_path) == []
    parts = [tmp_path / f"a[1]-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.touch()
    assert find_gguf(tmp_path) == parts
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=r"several GGUF models, a\[1\]-00001-of-00002\.gguf and b\.gguf"):
        find_gguf(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert find_gguf(tmp_path) == []


def test_a_symlinked_file_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("target")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "target").read_text() == "target"
    assert (tmp_path / "link").read_text() == "new"
