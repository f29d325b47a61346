"""What watches over the loss: a number that is none, or a spike, names its batch; the batch may then be left out."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tenfold.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What counts as a bad step, and what then happens.

    Attributes:
        on_bad_step: "stop" raises; "skip" goes back to the last checkpoint and leaves the batch out.
        spike: a loss this many standard deviations above the mean of the last `window` is bad, too; None lets it pass.
        window: steps that a spike is judged by; before there are as many, none is one.
        max_skipped: batches left out before the run stops all the same.
    """

    on_bad_step: str = "stop"
    spike: float | None = None
    window: int = 100
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.on_bad_step not in ("stop", "skip"):
            raise ConfigError(f"on_bad_step must be stop or skip; it is {self.on_bad_step!r}")
        if self.spike is not None and not self.spike > 0:
            raise ConfigError(f"the loss spike must be above 0 standard deviations; it is {self.spike}")


class Guard:
    """Judges the losses of a run, one after the other.

    Args:
        config: what is bad.
        losses: the last ones of a run that goes on.
    """

    def __init__(self, config: GuardConfig, losses: list[float]) -> None:
        self._config = config
        self._losses = deque(losses, maxlen=config.window)

    @property
    def losses(self) -> list[float]:
        """Those that the next one is judged by."""
        return list(self._losses)

    def judge(self, metrics: Mapping[str, float]) -> str | None:
        """What is wrong with a step's numbers; None if nothing is, and then its loss counts for the next ones."""
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                return f"the {name} is {metrics[name]}"
        loss, spike = metrics["loss"], self._config.spike
        if spike is not None and len(self._losses) == self._config.window:
            mean, deviation = float(np.mean(self._losses)), float(np.std(self._losses))
            if loss > mean + spike * deviation:
                return f"the loss {loss:.4g} is a spike above {mean:.4g} ± {deviation:.2g}"
        self._losses.append(loss)
        return None
