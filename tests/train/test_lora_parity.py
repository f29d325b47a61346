"""Training adapters against PEFT, and preference losses against TRL: golden files of `tests/parity`."""

from pathlib import Path

import pytest

from tests.parity import dpo, lora

pytestmark = pytest.mark.usefixtures("mixed_dtypes")

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", [pytest.param("lora", marks=pytest.mark.slow), "dora"])  # which has what lora has
def test_every_step_has_the_loss_that_peft_has(name: str, tmp_path: Path) -> None:
    lora.assert_losses_agree(GOLDEN / f"{name}.json", tmp_path)


def test_preference_losses_are_those_of_trl(tmp_path: Path) -> None:
    dpo.assert_losses_agree(GOLDEN / "dpo.json", tmp_path)
