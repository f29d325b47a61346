"""A training run against torch: the golden file of `tests/parity/training_reference.py`."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.parity import training

GOLDEN = Path(__file__).parent / "golden" / "llama-adamw.json"


@pytest.fixture(autouse=True)
def mixed_dtypes() -> Iterator[None]:
    """optax multiplies floats with integer step counts, which the suite's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_every_step_has_the_loss_that_torch_has(tmp_path: Path) -> None:
    training.assert_losses_agree(GOLDEN, tmp_path)
