"""Training runs against torch as it is now, from weights and documents that no golden file has: `make parity`."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.parity import training
from tests.parity.test_live import SEED, run_peer

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def mixed_dtypes() -> Iterator[None]:
    """optax multiplies floats with integer step counts, which the suite's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_every_step_has_the_loss_that_torch_has(tmp_path: Path) -> None:
    run_peer("-m", "tests.parity.training_reference", "--write", str(tmp_path), "--seed", str(SEED))
    training.assert_losses_agree(tmp_path / "llama-adamw.json", tmp_path)
