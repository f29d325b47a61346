"""Fetching models: directories in place, object stores and the hub through their real clients."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tenfold.base import storage
from tenfold.base.errors import CheckpointError
from tenfold.base.files import TOKENIZER_FILES
from tests.base.servers import HubHandler, S3Handler, Server, serving

FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[1]",
    "chat_template.jinja": b"{{ x }}",
    "model-00001-of-00002.safetensors": bytes(range(256)) * 40,
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{ }",
}
OTHERS = {
    "README.md": b"read",
    "pytorch_model.bin": b"pickle",
    "consolidated.safetensors": b"copy",
    "original/model.safetensors": b"other",
}


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# --- local ----------------------------------------------------------------------------------------------------------


def test_a_directory_is_used_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage.fetch(tmp_path) == tmp_path
    assert storage.fetch(str(tmp_path)) == tmp_path
    assert storage.fetch(tmp_path.as_uri()) == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert storage.fetch(tmp_path.name) == tmp_path


def test_a_file_uri_may_have_escapes(tmp_path: Path) -> None:
    (tmp_path / "my model").mkdir()
    assert storage.fetch((tmp_path / "my model").as_uri()) == tmp_path / "my model"


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "~/absent", "a/b/c", "file:///absent", ""])
def test_a_missing_directory_is_named(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if model == "":
        assert storage.fetch(model) == tmp_path
        return
    with pytest.raises(CheckpointError, match="there is no such directory"):
        storage.fetch(model)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; pass the directory"):
        storage.fetch(tmp_path / "model.safetensors")


def test_a_gguf_file_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").touch()
    assert storage.fetch(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    assert storage.fetch((tmp_path / "m.gguf").as_uri()) == tmp_path / "m.gguf"
    monkeypatch.chdir(tmp_path)
    assert storage.fetch("m.gguf") == tmp_path / "m.gguf"


@pytest.mark.parametrize("model", ["absent.gguf", "org/absent.gguf", "org/m/absent.gguf", "file:///absent.gguf"])
def test_a_missing_gguf_file_is_never_taken_for_a_hub_id(model: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such file.*hf download"):
        storage.fetch(model)


@pytest.mark.parametrize("model", ["http://host/model", "ftp://host/model"])
def test_an_unknown_scheme_is_named(model: str) -> None:
    with pytest.raises(CheckpointError, match=r":// is not supported; pass file://, gs://, s3://, az://"):
        storage.fetch(model)


def test_only_hub_ids_have_revisions(tmp_path: Path) -> None:
    for model in (str(tmp_path), "s3://bucket/model"):
        with pytest.raises(CheckpointError, match="leave revision='v2' out"):
            storage.fetch(model, revision="v2")


# --- object stores --------------------------------------------------------------------------------------------------


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with serving(S3Handler) as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT", server.url)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("TENFOLD_CACHE_DIR", str(tmp_path / "cache"))
        server.files = {f"/bucket/models/m/{name}": body for name, body in (FILES | OTHERS).items()}
        yield server


URI = "s3://bucket/models/m"


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_CHUNK", 4096)


def test_a_checkpoint_is_copied_and_nothing_else(s3: Server) -> None:
    directory = storage.fetch(URI, progress=True)
    assert contents(directory) == FILES
    assert directory.is_relative_to(Path(os.environ["TENFOLD_CACHE_DIR"]))
    assert directory.parent.name.startswith("m-")


def test_what_is_cached_is_not_copied_again(s3: Server) -> None:
    first = storage.fetch(URI)
    count = len(s3.downloads())
    assert storage.fetch(f"{URI}/") == first
    assert len(s3.downloads()) == count


def test_a_changed_checkpoint_replaces_the_cached_one(s3: Server) -> None:
    old = storage.fetch(URI)
    s3.files["/bucket/models/m/config.json"] = b"{1}"
    new = storage.fetch(URI)
    assert contents(new) == FILES | {"config.json": b"{1}"}
    assert not old.exists()


@pytest.mark.usefixtures("small_chunks")
def test_an_interrupted_copy_resumes(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_STREAMS", 1)
    weights = "/bucket/models/m/model-00001-of-00002.safetensors"
    s3.files = {weights: s3.files[weights]}
    s3.break_after = 2
    with pytest.raises(CheckpointError, match="cannot be used; check the URI and the credentials.*a download resumes"):
        storage.fetch(URI)
    parts = [path.name for path in Path(os.environ["TENFOLD_CACHE_DIR"]).rglob("*.part")]
    assert parts == ["model-00001-of-00002.safetensors.part"]
    s3.break_after = None
    s3.requests.clear()
    assert contents(storage.fetch(URI)) == {"model-00001-of-00002.safetensors": s3.files[weights]}
    assert [span for _, path, span in s3.requests if path == weights] == ["bytes=8192-10239"]


@pytest.mark.usefixtures("small_chunks")
def test_a_change_while_copying_is_noticed(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = "/bucket/models/m/model-00001-of-00002.safetensors"
    send_file = S3Handler.send_file

    def change_after(handler: S3Handler, content: bytes, headers: dict[str, str]) -> None:
        send_file(handler, content, headers)
        if content == FILES["model-00001-of-00002.safetensors"]:
            s3.files[weights] = bytes(len(content))

    monkeypatch.setattr(S3Handler, "send_file", change_after)
    with pytest.raises(CheckpointError, match="changed while it was being downloaded"):
        storage.fetch(URI)


def test_an_empty_place_and_one_without_safetensors_are_named(s3: Server) -> None:
    with pytest.raises(CheckpointError, match="has no file of a checkpoint"):
        storage.fetch("s3://bucket/models/other")
    s3.files = {"/bucket/models/m/config.json": b"{}", "/bucket/models/m/pytorch_model.bin": b"pickle"}
    with pytest.raises(CheckpointError, match=r"weights as pytorch_model\.bin"):
        storage.fetch(URI)
    assert contents(storage.fetch(URI, files=("config.json",))) == {"config.json": b"{}"}


def test_a_gguf_file_is_copied_with_the_rest_of_its_split(s3: Server) -> None:
    parts = {f"p-0000{number}-of-00002.gguf": b"GGUF%d" % number for number in (1, 2)}
    others = {"p-00001-of-00003.gguf": b"", "whole[1].gguf": b"GGUF", "config.json": b"{}"}
    s3.files = {f"/bucket/models/m/{name}": body for name, body in (parts | others).items()}
    file = storage.fetch(f"{URI}/p-00002-of-00002.gguf")
    assert file.name == "p-00002-of-00002.gguf"
    assert contents(file.parent) == parts
    whole = storage.fetch(f"{URI}/whole[1].gguf")
    assert contents(whole.parent) == {"whole[1].gguf": b"GGUF"}
    assert file.exists()
    with pytest.raises(CheckpointError, match=r"absent\.gguf: there is no such file"):
        storage.fetch(f"{URI}/absent.gguf")


def test_of_a_directory_of_gguf_files_one_has_to_be_named(s3: Server) -> None:
    s3.files = {f"/bucket/models/m/{name}.gguf": b"GGUF" for name in ("a", "b")}
    with pytest.raises(CheckpointError, match=r"a\.gguf and 1 more.*Name one GGUF file"):
        storage.fetch(URI)


def test_files_are_copied_from_any_depth_or_one_alone(s3: Server) -> None:
    data = {"train/0.parquet": b"a", "train/1.parquet": b"bc", "dataset_dict.json": b"{}"}
    s3.files = {f"/bucket/data/{name}": body for name, body in (data | {"README.md": b"read"}).items()}
    directory = storage.fetch_files("s3://bucket/data", ("*.parquet", "*.json"))
    found = {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}
    assert found == data
    assert storage.fetch_files("s3://bucket/data/train/1.parquet", ("*.parquet",)).read_bytes() == b"bc"
    with pytest.raises(CheckpointError, match=r"s3://bucket/data/none has none of \*\.parquet"):
        storage.fetch_files("s3://bucket/data/none", ("*.parquet",))


def test_files_on_disk_are_used_in_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert storage.fetch_files((tmp_path / "a.txt").as_uri(), ("*.txt",)) == tmp_path / "a.txt"
    with pytest.raises(CheckpointError, match="there is no such file or directory"):
        storage.fetch_files(str(tmp_path / "b.txt"), ("*.txt",))


def test_a_refusal_is_named(s3: Server) -> None:
    s3.status = (403, {})
    with pytest.raises(CheckpointError, match=r"check the URI and the credentials.*403 Forbidden[^\n]*$"):
        storage.fetch(URI)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.exceptions", None)
    with pytest.raises(CheckpointError, match=r"pip install 'tenfold\[cloud\]'"):
        storage.fetch("gs://bucket/model")


# --- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with serving(HubHandler) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix("https://huggingface.co")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        server.files = {f"/org/m/{name}": body for name, body in (FILES | OTHERS).items()}
        yield server


def test_a_repository_is_downloaded_without_what_is_not_needed(hub: Server, capfd: pytest.CaptureFixture[str]) -> None:
    assert contents(storage.fetch("org/m")) == FILES
    assert capfd.readouterr().err == ""


def test_a_cached_repository_works_offline(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    first = storage.fetch("org/m", revision="main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert storage.fetch("org/m") == first


def test_an_uncached_repository_offline_says_what_to_do(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="org/m is not a local directory.*HF_HUB_OFFLINE"):
        storage.fetch("org/m")


def test_an_unreachable_hub_says_what_to_do(hub: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be reached"):
        storage.fetch("org/m")


def test_an_unknown_repository_and_revision_are_named(hub: Server) -> None:
    with pytest.raises(CheckpointError, match="neither a local directory nor a repository"):
        storage.fetch("org/absent")
    with pytest.raises(CheckpointError, match="no revision 'v9'"):
        storage.fetch("org/m", revision="v9")


def test_a_gated_repository_says_how_to_get_in(hub: Server) -> None:
    hub.status = (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(CheckpointError, match="gated: accept its licence.*HF_TOKEN"):
        storage.fetch("org/m")


def test_a_repository_of_pickles_is_refused(hub: Server) -> None:
    hub.files = {"/org/m/config.json": b"{}", "/org/m/pytorch_model.bin": b"pickle"}
    with pytest.raises(CheckpointError, match=r"weights as pytorch_model\.bin.*from_pretrained\('org/m'\)"):
        storage.fetch("org/m")
    assert hub.downloads() == []


def test_a_repository_of_a_tokenizer_alone_is_enough_for_its_files(hub: Server) -> None:
    hub.files = {"/org/m/tokenizer.json": b"[]", "/org/m/README.md": b"read"}
    assert contents(storage.fetch("org/m", files=TOKENIZER_FILES)) == {"tokenizer.json": b"[]"}


def test_an_impossible_id_is_named(hub: Server) -> None:
    with pytest.raises(CheckpointError, match="neither a local directory nor a Hugging Face id"):
        storage.fetch("org/m..x")
