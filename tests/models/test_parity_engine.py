"""The engine against transformers: 32 ragged prompts at once, 64 greedy tokens, every log-probability."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parity import golden
from tests.parity.cases import CASES


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that several models share are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENFOLD_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [case.name for case in CASES if case.engine])
def test_engine_generates_as_transformers_does(name: str, tmp_path: Path) -> None:
    wanted = golden.read(golden.DIRECTORY / f"{name}.json")
    golden.save_checkpoint(wanted, tmp_path)
    golden.assert_engine_agrees(wanted, tmp_path)
