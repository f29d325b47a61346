"""A training run against torch: the golden file of `tests/parity/training_reference.py`."""

from pathlib import Path

import pytest

from tests.parity import training

pytestmark = pytest.mark.usefixtures("mixed_dtypes")

GOLDEN = Path(__file__).parent / "golden" / "llama-adamw.json"


def test_every_step_has_the_loss_that_torch_has(tmp_path: Path) -> None:
    training.assert_losses_agree(GOLDEN, tmp_path)
