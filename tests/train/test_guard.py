"""What counts as a bad step."""

import math

import pytest

from tenfold.base.errors import ConfigError
from tenfold.train.guard import Guard, GuardConfig


def judge(guard: Guard, loss: float, grad_norm: float = 1.0) -> str | None:
    return guard.judge({"loss": loss, "grad_norm": grad_norm})


def test_numbers_that_are_none_are_bad() -> None:
    guard = Guard(GuardConfig(), [])
    assert judge(guard, 1.0) is None
    assert judge(guard, math.nan) == "the loss is nan"
    assert judge(guard, 1.0, math.inf) == "the grad_norm is inf"


def test_a_spike_is_judged_by_the_last_losses_and_does_not_count_among_them() -> None:
    guard = Guard(GuardConfig(spike=3.0, window=4), [])
    for loss in (100.0, 1.0, 1.2, 1.0):
        assert judge(guard, loss) is None  # not yet as many as the window
    assert judge(guard, 1.2) is None
    wrong = judge(guard, 1.5)  # mean 1.1, deviation 0.1
    assert wrong is not None and "1.5 is a spike above 1.1 ± 0.1" in wrong
    assert guard.losses == [1.0, 1.2, 1.0, 1.2]
    assert judge(Guard(GuardConfig(spike=3.0, window=4), guard.losses), 1.39) is None


def test_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="stop or skip"):
        GuardConfig(on_bad_step="ignore")
    with pytest.raises(ConfigError, match="above 0"):
        GuardConfig(spike=0.0)
