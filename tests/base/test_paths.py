"""Where the cache lies."""

from pathlib import Path

import pytest

from tenfold.base import paths


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENFOLD_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_the_cache_is_in_the_home_directory() -> None:
    assert paths.cache_dir() == Path.home() / ".cache" / "tenfold"


def test_xdg_moves_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_dir() == tmp_path / "tenfold"


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_xdg_must_be_absolute(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert paths.cache_dir() == Path.home() / ".cache" / "tenfold"


def test_our_own_variable_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    monkeypatch.setenv("TENFOLD_CACHE_DIR", str(tmp_path))
    assert paths.cache_dir() == tmp_path
    monkeypatch.setenv("TENFOLD_CACHE_DIR", "~/mine")
    assert paths.cache_dir() == Path.home() / "mine"
