"""The families against transformers, by the golden files that `tests/parity/reference.py` wrote."""

import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from tenfold.base.files import matches
from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tenfold.nn.param import count, leaves
from tests.parity import golden
from tests.parity.cases import CASES

SCANNED = (
    "llama-llama3-rope-tied",
    "gemma3-v4",
    "gemma3n",
    "deepseek_v3",
    "qwen3_next",
    "llama4",
)  # others: `make slow`


@pytest.mark.parametrize("name", golden.NAMES)
def test_packed_forward_scores_as_transformers_does(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, stacked=False)


@pytest.mark.parametrize(
    "name",
    [pytest.param(c.name, marks=() if c.name in SCANNED else pytest.mark.slow) for c in CASES if c.engine],
)
def test_scan_over_stacked_layers_scores_as_transformers_does(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, stacked=True)


def check(name: str, tmp_path: Path, *, stacked: bool) -> None:
    wanted = golden.read(golden.DIRECTORY / f"{name}.json")
    golden.save_checkpoint(wanted, tmp_path)
    model = resolve(checkpoint.read_config(tmp_path)).with_max_len(wanted.max_len)
    params = checkpoint.load(tmp_path, model.params(stacked=stacked), jnp.float32, skipped=model.skipped())
    golden.assert_scores_agree(wanted, model, params)


def test_every_case_has_a_golden_file() -> None:
    assert sorted(case.name for case in CASES) == golden.NAMES
    for case in CASES:
        assert golden.read(golden.DIRECTORY / f"{case.name}.json").config == case.config


@pytest.mark.parametrize("name", golden.NAMES)
def test_declaration_has_the_tensors_of_transformers(name: str) -> None:
    wanted = golden.read(golden.DIRECTORY / f"{name}.json")
    model = resolve(wanted.config)
    tree = model.params()
    used = {tensor for tensor in wanted.tensors if not matches(tensor, model.skipped())}
    sources = [source for _, p in leaves(tree) for source in p.sources]
    assert {name for source in sources for name in (source.name, *source.aliases) if name in used} == used
    assert {source.name for source in sources if not used.intersection((source.name, *source.aliases))} == set()
    assert count(tree) == sum(math.prod(wanted.tensors[name]) for name in used)
