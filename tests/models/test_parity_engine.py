"""The engine against transformers: 32 ragged prompts at once, 64 greedy tokens, every log-probability."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tenfold.models import FAMILIES
from tests.parity import golden
from tests.parity.cases import CASES

REPRESENTATIVES = ("gpt_oss", "deepseek_v3")  # windows, sinks and experts; latents


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that several models share are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENFOLD_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def marked(name: str) -> object:
    """Every architecture goes through the engine; `make slow` runs those whose caches another one has too."""
    return pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [marked(case.name) for case in CASES if case.engine])
def test_engine_generates_as_transformers_does(name: str, tmp_path: Path) -> None:
    wanted = golden.read(golden.DIRECTORY / f"{name}.json")
    golden.save_checkpoint(wanted, tmp_path)
    golden.assert_engine_agrees(wanted, tmp_path)


def test_every_architecture_is_a_case() -> None:
    cases = [case for case in CASES if case.engine]
    assert {case.name for case in cases} >= set(REPRESENTATIVES)
    text = {name for name in FAMILIES if not name.endswith("ForConditionalGeneration")}  # the others' text is theirs
    assert {case.config["architectures"][0] for case in cases} >= text
