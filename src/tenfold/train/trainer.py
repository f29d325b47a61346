"""The loop that trains: a batch, a step, and now and then an evaluation and a checkpoint, until the steps are done.

A run that is started again goes on from its last checkpoint, and every loss from there is, to the last bit, what it
would have been: the data, the guard's memory and the optimizer are all part of a checkpoint. The numbers of a step are
read while the next one runs.
"""

import json
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from tenfold.base.allocator import keep_freed_memory
from tenfold.base.errors import ConfigError, TrainingError
from tenfold.kernels.float8 import has_units
from tenfold.nn.param import Tree, abstract
from tenfold.parallel.hosts import gather
from tenfold.parallel.layout import NOWHERE, Layout
from tenfold.train.batches import Batches, place
from tenfold.train.checkpoints import CheckpointConfig, Checkpoints
from tenfold.train.events import Events, Stopwatch
from tenfold.train.flops import peak_flops
from tenfold.train.guard import Guard, GuardConfig
from tenfold.train.loss import Loss
from tenfold.train.offload import offloaded, on_host
from tenfold.train.optimizers import OptimizerConfig, learning_rate, make_optimizer
from tenfold.train.parallelism import Parallelism
from tenfold.train.plot import plot_run
from tenfold.train.reporting import ProgressLine, make_reporters
from tenfold.train.signals import told_to_stop
from tenfold.train.state import TrainState, abstract_state, init_state
from tenfold.train.step import Grad, accumulate, make_step

logger = logging.getLogger(__name__)

Evaluate = Callable[[Tree], Mapping[str, float]]
"""Measures trained weights; gives numbers by name."""

_ASK_EVERY = 10  # steps, of runs on several hosts: to ask whether one was told to stop waits for all of them


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run.

    Attributes:
        steps: of the optimizer.
        optimizer: how weights change.
        parallelism: how the run is spread over devices.
        dtype: that the loss is computed in: "float32", or "bfloat16" with float32 masters.
        fp8: make the products of linear layers within the model's layers, and their gradients, in 8-bit floats.
        eval_steps: steps between evaluations; there is one at the end, too.
        checkpoints: when they are made, and which are kept.
        checkpoint_dir: where, if not in the run's directory; a path, or a `file://`, `gs://`, `s3://` or `az://` URI.
        guard: what is done about bad losses.
        report_to: "tensorboard" and "mlflow".
        plots: draw the loss and the gradient's norm at the end.
        profile: first and last step of a profile, counted from 1, which is written to the run's directory.
    """

    steps: int
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallelism: Parallelism = field(default_factory=Parallelism)
    dtype: str = "float32"
    fp8: bool = False
    eval_steps: int = 500
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    checkpoint_dir: str | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)
    report_to: tuple[str, ...] = ()
    plots: bool = True
    profile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.eval_steps < 1:
            raise ConfigError("steps and eval_steps must be at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"losses are computed in float32 or bfloat16, not in {self.dtype!r}")
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1] <= self.steps:
            raise ConfigError(f"a profile is of steps N:M with 1 <= N <= M <= {self.steps}; it is {self.profile}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is trained.

    Attributes:
        loss: of trainable and frozen weights on a batch.
        declared: the `Param`s of the trainable weights.
        initial: makes the weights that a new run starts from, in float32, where `shardings` put them.
        frozen: the other weights.
        shardings: of the trainable weights; None where there is no mesh.
        layout: how a batch's rows lie.
        grad: of the loss, if not by `accumulate`, such as by a pipeline.
        flops_per_token: of a step, for utilisation; 0 shows none.
    """

    loss: Loss
    declared: Tree
    initial: Callable[[], Tree]
    frozen: Tree = field(default_factory=dict)
    shardings: Tree = None
    layout: Layout = NOWHERE
    grad: Grad | None = None
    flops_per_token: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run ended.

    Attributes:
        state: the last one.
        finished: all steps are done; False if the run was told to stop, and may go on from its checkpoint.
    """

    state: TrainState
    finished: bool


def train(
    job: Job, config: TrainConfig, batches: Batches, run_dir: Path, *, evaluate: Evaluate | None = None
) -> Trained:
    """Trains, from the last checkpoint of the run if there is one.

    SIGTERM and SIGINT end the run after the step that is under way, with a checkpoint.

    Args:
        job: what is trained.
        config: how.
        batches: of this process's share of the rows; numpy, and all of one shape.
        run_dir: receives `config.json`, `events.jsonl` (a line per step, and one per evaluation), plots, checkpoints
            and profiles.
        evaluate: its numbers join the events.

    Raises:
        ConfigError: the options do not fit each other, the batches, the mesh, or the checkpoint.
        CheckpointError: there are checkpoints, and all are damaged.
        TrainingError: a loss was bad; says which batch's, and where that was written.
    """
    device = jax.devices()[0]
    if config.fp8 and not has_units(device):
        logger.warning("%s has no units for 8-bit floats: fp8 rounds as there, but saves no time", device.device_kind)
    if device.platform == "cpu":
        keep_freed_memory()  # a step's temporaries are as large as all activations
    run_dir.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stop = stack.enter_context(told_to_stop())
        return _Run(job, config, batches, run_dir, evaluate, stack).run(stop)


@dataclass(frozen=True)
class _Pending:
    """A step that was started, and whose numbers are not read yet."""

    step: int
    batch_number: int
    batch: Any
    metrics: Mapping[str, jax.Array]


class _Run:
    """A run under way. What it opens, `stack` closes."""

    def __init__(
        self,
        job: Job,
        config: TrainConfig,
        batches: Batches,
        run_dir: Path,
        evaluate: Evaluate | None,
        stack: ExitStack,
    ) -> None:
        self._job, self._config, self._batches, self._run_dir = job, config, batches, run_dir
        self._evaluate = evaluate
        self._main = jax.process_index() == 0
        self._rate = learning_rate(config.optimizer, config.steps)
        self._optimizer = make_optimizer(config.optimizer, config.steps, job.declared)
        self._abstract = self._describe()
        self._places: TrainState = jax.tree.map(lambda x: x.sharding, self._abstract)
        self._kept = on_host(self._places) if config.parallelism.offload_optimizer else self._places
        reporters = make_reporters(config.report_to, run_dir) if self._main else []
        self._checkpoints = Checkpoints(config.checkpoint_dir or str(run_dir / "checkpoints"), config.checkpoints)
        stack.push(self._close_checkpoints)
        if self._main:
            (run_dir / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        self._drawn = 0
        self._skipped: set[int] = set()
        self._guard = Guard(config.guard, [])
        self._state = self._begin()
        first = int(self._state.step)
        self._events = Events(run_dir, first, active=self._main)
        self._progress = ProgressLine(config.steps, first, shown=self._main)
        self._reporters = [*reporters, self._progress]
        for closed in (self._events, *self._reporters):
            stack.callback(closed.close)
        self._peak = peak_flops(config.dtype) if job.flops_per_token else 0.0
        self._step = self._jit_step()
        self._clock = Stopwatch()

    def _close_checkpoints(self, error: type[BaseException] | None, *_: Any) -> None:
        if error is None or not issubclass(error, jax.errors.JaxRuntimeError) or jax.process_count() == 1:
            self._checkpoints.close()  # which waits for the other hosts; otherwise one of them is gone

    # --- starting, and going back -----------------------------------------------------------------------------------

    def _describe(self) -> TrainState:
        """Shapes and dtypes of the state, and where a step has it."""
        declared = abstract(self._job.declared, jnp.float32)
        state = abstract_state(self._optimizer, declared, self._job.shardings)
        if self._job.shardings is not None:
            return state
        here = SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)

    def _begin(self) -> TrainState:
        restored = self._restore()
        if restored is not None:
            return restored
        state = init_state(self._optimizer, self._job.initial(), self._job.shardings)
        state = jax.device_put(state, self._kept)
        if self._config.guard.on_bad_step == "skip":  # so that there is a checkpoint to go back to
            self._save(state)
        return state

    def _restore(self) -> TrainState | None:
        """The state of the last checkpoint, with the batches and the guard where they stood; None if there is none."""
        found = self._checkpoints.restore(self._abstract)
        if found is None:
            return None
        data = found.host["data"]
        index, shares = self._job.layout.row_share
        if len(data) != shares:
            raise ConfigError(
                f"the run's data was read in {len(data)} shares, and now by hosts and a mesh that read it in {shares}: "
                f"go on with {len(data)} hosts along data, fsdp and expert"
            )
        self._batches.set_state(json.loads(data[index]))
        self._drawn = found.host["drawn"]
        self._skipped |= set(found.host["skipped"])
        self._guard = Guard(self._config.guard, found.host["losses"])
        return jax.device_put(found.state, self._kept)

    def _save(self, state: TrainState, metrics: Mapping[str, float] | None = None) -> None:
        states = [part.decode() for part in gather(json.dumps(self._batches.get_state()).encode())]
        data = [state for _, state in sorted(dict(zip(self._job.layout.row_shares, states, strict=True)).items())]
        host = {"drawn": self._drawn, "skipped": sorted(self._skipped), "losses": self._guard.losses, "data": data}
        self._checkpoints.save(jax.device_put(state, self._places), host, metrics)

    def _jit_step(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        config, job = self._config, self._job
        step = make_step(
            job.grad or accumulate(job.loss, config.parallelism.micro_batches),
            self._optimizer,
            clip_norm=config.optimizer.max_grad_norm,
            compute_dtype=jnp.dtype(config.dtype),
        )
        if config.parallelism.offload_optimizer:
            step = offloaded(step, self._places)
        return jax.jit(step, donate_argnums=0, out_shardings=(self._kept, None))

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> Trained:
        """Steps until all are done, or it is told to stop."""
        done, pending = int(self._state.step), None
        while done < self._config.steps:
            self._profile(done + 1, begins=True)
            number, batch = self._draw()
            self._state, metrics = self._step(self._state, self._job.frozen, self._place(batch))
            done += 1
            previous, pending = pending, _Pending(done, number, batch, metrics)
            stopped = self._agree(stop, done)
            pause = stopped or self._pauses(done)
            if (previous is not None and self._finish(previous)) or (pause and self._finish(pending)):
                done, pending = int(self._state.step), None
            elif pause:
                pending = None
                self._profile(done, begins=False)
                self._pause(done)
                if stopped:
                    break
        self._save(self._state)
        self._checkpoints.wait()
        if self._main and self._config.plots:
            plot_run(self._run_dir)
        return Trained(state=self._state, finished=done == self._config.steps)

    def _draw(self) -> tuple[int, Any]:
        """The next batch that is not left out, and its number, counted from 1."""
        with self._clock.on("data"):
            while True:
                batch = next(self._batches)
                self._drawn += 1
                if self._drawn not in self._skipped:
                    return self._drawn, batch

    def _place(self, batch: Any) -> Any:
        layout = self._job.layout
        rows, length = (*jax.tree.leaves(batch)[0].shape, 1)[:2]
        layout.check(rows * layout.row_share[1], length, self._config.parallelism.micro_batches)
        return place(batch, layout)

    def _pauses(self, done: int) -> bool:
        config = self._config
        every = (config.checkpoints.save_steps, config.eval_steps if self._evaluate else config.steps)
        profiled = config.profile is not None and done == config.profile[1]
        return profiled or done == config.steps or any(done % n == 0 for n in every)

    def _pause(self, done: int) -> None:
        """Evaluates and saves where it is time for it. The numbers of all steps are read, so none of them is bad."""
        last = done == self._config.steps
        metrics: Mapping[str, float] = {}
        if self._evaluate and (last or done % self._config.eval_steps == 0):
            with self._clock.on("evaluation"):
                metrics = dict(self._evaluate(self._state.trainable))
            self._events.write({"step": done, **metrics})
            for reporter in self._reporters:
                reporter.report(done, metrics)
        if last or done % self._config.checkpoints.save_steps == 0:
            with self._clock.on("checkpoint"):
                self._save(self._state, metrics)

    def _finish(self, pending: _Pending) -> bool:
        """Reads and reports the numbers of a step. True if it was bad, and the run went back."""
        metrics = {name: float(value) for name, value in jax.device_get(dict(pending.metrics)).items()}
        wrong = self._guard.judge(metrics)
        if wrong is not None:
            self._go_back(pending, wrong)
            return True
        seconds = self._clock.step()
        tokens = jax.tree.leaves(pending.batch)[0].size * self._job.layout.row_share[1]
        numbers = {
            **metrics,
            "learning_rate": float(np.asarray(self._rate(pending.step - 1))),
            "tokens_per_s": round(tokens / seconds, 1),
            "data_share": round(self._clock.waited / seconds, 4),
            "goodput": round(self._clock.goodput, 4),
        }
        if self._peak:
            numbers["mfu"] = self._job.flops_per_token * tokens / seconds / self._peak
        self._events.write({"step": pending.step, **numbers})
        for reporter in self._reporters:
            reporter.report(pending.step, numbers)
        return False

    def _go_back(self, bad: _Pending, wrong: str) -> None:
        """Leaves a batch out and starts again from the last checkpoint, or raises."""
        guard = self._config.guard
        what = f"{wrong} at step {bad.step}, of batch {bad.batch_number}, which is in {self._keep(bad)}"
        if guard.on_bad_step == "stop":
            raise TrainingError(f"{what}. Look at it; lower the learning rate, or let such batches be skipped")
        if len(self._skipped) >= guard.max_skipped:
            raise TrainingError(f"{what}. {len(self._skipped)} batches were skipped before; lower the learning rate")
        logger.warning("%s: the run goes back to its last checkpoint, and leaves that batch out", what)
        self._skipped.add(bad.batch_number)
        restored = self._restore()
        if restored is None:
            raise TrainingError(f"{what}, and there is no checkpoint to go back to")
        self._state = restored
        step = int(restored.step)
        self._clock.lose(bad.step - 1 - step)
        self._events.rewind(step)
        self._events.write({"step": step, "skipped_batch": bad.batch_number, "why": wrong})

    def _keep(self, bad: _Pending) -> Path:
        """Writes a batch, so that it can be looked at."""
        path = self._run_dir / f"batch-{bad.batch_number}-of-process-{jax.process_index()}.npz"
        named = jax.tree_util.tree_leaves_with_path(bad.batch)
        arrays: dict[str, Any] = {jax.tree_util.keystr(at, simple=True): np.asarray(x) for at, x in named}
        np.savez(path, **arrays)
        return path

    def _profile(self, step: int, *, begins: bool) -> None:
        """Starts a profile before its first step, or ends it after its last."""
        if self._config.profile is None:
            return
        if begins and step == self._config.profile[0]:
            jax.profiler.start_trace(str(self._run_dir / "profile"))
        elif not begins and step == self._config.profile[1]:
            jax.profiler.stop_trace()

    def _agree(self, stop: threading.Event, done: int) -> bool:
        """Whether any process was told to stop: all have to do the same steps."""
        if jax.process_count() == 1:
            return stop.is_set()
        if done % _ASK_EVERY:
            return False
        return bool(multihost_utils.process_allgather(np.asarray(stop.is_set())).any())
