"""Optimizers and learning rates by name. Optax has the former; names are its own and those of Hugging Face's trainer.

Of the Shampoo class there is Muon: no library that is kept up has the full method for JAX.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from tenfold.base.errors import ConfigError
from tenfold.nn.param import Param, Tree, map_params

OPTIMIZERS = ("adamw", "adafactor", "muon")
SCHEDULES = ("constant", "linear", "cosine", "wsd")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights change.

    Attributes:
        optimizer: "adamw" (Loshchilov and Hutter, 2019), "adafactor" (Shazeer and Stern, 2018), or "muon" (Jordan,
            2024; with the scale of Liu et al., 2025, so that AdamW's learning rates fit), which takes AdamW for what
            is no matrix of a layer and lets that keep its weights.
        learning_rate: the peak.
        schedule: what comes after the warm-up: "constant"; "linear" or "cosine" down to the end; or "wsd", which stays
            and falls linearly over the last `decay_steps` (Hu et al., 2024).
        warmup_steps: over which the rate rises linearly from zero.
        decay_steps: of "wsd".
        min_lr_ratio: what of the peak is left at the end.
        weight_decay: decoupled, and times the learning rate; on tensors of two or more dims in the checkpoint, so not
            on norms and biases.
        b1, b2, eps: of AdamW.
        momentum: of Muon.
        max_grad_norm: the gradient's global norm is cut to this; None leaves it.
    """

    optimizer: str = "adamw"
    learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    min_lr_ratio: float = 0.0
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    max_grad_norm: float | None = 1.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if value not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}; it is {value!r}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ConfigError(f"learning_rate must be positive; it is {self.learning_rate}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(f"min_lr_ratio must be from 0 to 1; it is {self.min_lr_ratio}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ConfigError(f"max_grad_norm must be positive, or None to clip nothing; it is {self.max_grad_norm}")
        if self.schedule == "wsd" and self.decay_steps < 1:
            raise ConfigError("the schedule wsd needs decay_steps, over which the rate falls at the end")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by the number of steps done before, out of `steps`.

    Raises ConfigError if the warm-up and the decay are longer than the run.
    """
    warmup, last = config.warmup_steps, config.decay_steps if config.schedule == "wsd" else 0
    if warmup < 0 or warmup + last > steps:
        raise ConfigError(f"{warmup} warmup_steps and {last} decay_steps do not fit into {steps} steps")

    def rate(count: Any) -> Any:
        xp = jnp if isinstance(count, jax.Array) else np  # on the host where it is only shown, so that nothing waits
        t = xp.asarray(count).astype(np.float32)
        match config.schedule:
            case "constant":
                left = xp.ones_like(t)
            case "linear":
                left = (steps - t) / max(steps - warmup, 1)
            case "cosine":
                left = 0.5 * (1 + xp.cos(np.pi * xp.clip((t - warmup) / max(steps - warmup, 1), 0, 1)))
            case _:
                left = (steps - t) / last
        left = config.min_lr_ratio + (1 - config.min_lr_ratio) * xp.clip(left, 0, 1)
        return config.learning_rate * xp.where(t < warmup, t / max(warmup, 1), left)

    return rate


def make_optimizer(config: OptimizerConfig, steps: int, declared: Tree) -> optax.GradientTransformation:
    """The optimizer of a run of `steps`, without clipping, which is the step's.

    Args:
        config: which one, and how.
        steps: of the whole run, which the schedule is cut to.
        declared: the `Param`s of what is trained: they say what decays, and what of an array is a matrix.
    """
    rate, decays = learning_rate(config, steps), map_params(decays_weight, declared)
    if config.optimizer == "adafactor":
        return optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False, decay_rate=0.8),
            optax.add_decayed_weights(-config.weight_decay, mask=decays),
            optax.scale_by_learning_rate(rate, flip_sign=False),
        )
    if config.optimizer == "muon":
        return contrib.muon(
            rate,
            beta=config.momentum,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=map_params(_matrix_dims, declared),
            consistent_rms=0.2,
        )
    return optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=decays)


def decays_weight(p: Param) -> bool:
    """Whether weight decay shrinks a weight: of two or more dims in the checkpoint, so no norm and no bias."""
    return len(p.checkpoint_shape(p.sources[0])) > 1


def _matrix_dims(p: Param) -> contrib.MuonDimensionNumbers | None:
    """Which dims of a weight are the inputs and the outputs of its product; None where AdamW shall train it.

    That is so for what no product uses, and for the embedding and the head.
    """
    if not p.inputs or "vocab" in p.axes.split():
        return None
    _, inputs, outputs = p.matrix_dims
    return contrib.MuonDimensionNumbers(tuple(inputs), tuple(outputs))
