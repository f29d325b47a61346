"""Training adapters against PEFT, and preference losses against TRL: golden files of `tests/parity`."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.parity import dpo, lora

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def mixed_dtypes() -> Iterator[None]:
    """optax multiplies floats with integer step counts, which the suite's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("name", [pytest.param("lora", marks=pytest.mark.slow), "dora"])  # which has what lora has
def test_every_step_has_the_loss_that_peft_has(name: str, tmp_path: Path) -> None:
    lora.assert_losses_agree(GOLDEN / f"{name}.json", tmp_path)


def test_preference_losses_are_those_of_trl(tmp_path: Path) -> None:
    dpo.assert_losses_agree(GOLDEN / "dpo.json", tmp_path)
