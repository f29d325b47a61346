"""The training loop: AdamW over packed rows, with its progress on the screen and its events on disk."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tenfold.data.packing import Rows
from tenfold.models.family import Model
from tenfold.nn.param import Tree, initialize
from tenfold.train.loss import next_token_loss


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation of one run.

    Attributes:
        steps: optimiser steps; the learning rate warms up over `warmup`, stays, and falls linearly to zero over the
            last `decay` (warm-up, stable, decay: Hu et al., 2024).
        learning_rate: the peak.
        weight_decay: decoupled, on matrices only.
        clip_norm: the gradient's global norm is cut to this.
        seed: of the initial weights.
        evaluate_every: steps between evaluations.
    """

    steps: int
    warmup: int = 100
    decay: int
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    b2: float = 0.98
    clip_norm: float = 1.0
    seed: int = 0
    evaluate_every: int = 250


def schedule(config: TrainConfig) -> optax.Schedule:
    """The learning rate by step."""
    peak, stable = config.learning_rate, config.steps - config.warmup - config.decay
    pieces = [
        optax.linear_schedule(0, peak, config.warmup),
        optax.constant_schedule(peak),
        optax.linear_schedule(peak, 0, config.decay),
    ]
    return optax.join_schedules(pieces, [config.warmup, config.warmup + stable])


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) after clipping by global norm."""
    adamw = optax.adamw(
        schedule(config),
        b2=config.b2,
        weight_decay=config.weight_decay,
        mask=lambda params: jax.tree.map(lambda w: w.ndim > 1, params),
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)


def train(
    model: Model,
    config: TrainConfig,
    batches: Iterator[Rows],
    run_dir: Path,
    evaluate: Callable[[Tree], dict[str, float]] | None = None,
    on_evaluation: Callable[[Tree], None] | None = None,
) -> Tree:
    """Trains from random weights and returns them, unstacked, in float32.

    Args:
        model: what to train.
        config: how.
        batches: yields at least `config.steps` batches; every new shape costs one compilation.
        run_dir: receives `config.json` and `events.jsonl`, one line per step.
        evaluate: measures the weights every `evaluate_every` steps and at the end; its numbers join the events.
        on_evaluation: is given the weights right after each evaluation, e.g. to save them.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(asdict(config), indent=2))
    tx = optimizer(config)
    params = initialize(model.params(), jax.random.key(config.seed), jnp.float32)
    state = tx.init(params)

    def step(params: Tree, state: Any, rows: Rows) -> tuple[Tree, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda params: next_token_loss(params, model, rows).mean)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    run_step = jax.jit(step, donate_argnums=(0, 1))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, (run_dir / "events.jsonl").open("w") as events:
        task = progress.add_task("training", total=config.steps)
        for i in range(1, config.steps + 1):
            started = time.perf_counter()
            rows = next(batches)
            params, state, loss_array = run_step(params, state, rows)
            event: dict[str, float] = {"step": i, "loss": float(loss_array)}
            if not np.isfinite(event["loss"]):
                raise FloatingPointError(f"the loss is {event['loss']} at step {i}; lower the learning rate")
            event["tokens_per_s"] = round(rows.tokens.size / (time.perf_counter() - started), 1)
            if evaluate and (i % config.evaluate_every == 0 or i == config.steps):
                event |= evaluate(params)
                if on_evaluation:
                    on_evaluation(params)
            print(json.dumps(event), file=events, flush=True)
            shown = " ".join(f"{name} {value:.4g}" for name, value in event.items() if name != "step")
            progress.update(task, advance=1, description=shown)
    return params
