"""The weights of published models, counted from their declarations: as many as transformers gives them."""

import json

import pytest

from tenfold.models.family import resolve
from tenfold.nn.param import count
from tests.parity.cases import CASES
from tests.parity.full_size import FULL_SIZE
from tests.parity.golden import DIRECTORY

COUNTS: dict[str, int] = json.loads((DIRECTORY / "parameter_counts.json").read_text())
ARCHITECTURES = {case.config["model_type"]: case.config["architectures"] for case in CASES}


@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_parameter_count(name: str) -> None:
    model = resolve(FULL_SIZE[name] | {"architectures": ARCHITECTURES[FULL_SIZE[name]["model_type"]]})
    assert count(model.params()) == COUNTS[name]
    assert count(model.params(stacked=True)) == COUNTS[name]
