"""Checkpoints of a run: written by Orbax behind the next steps, whole or not at all, and checked when they are read.

Orbax gives a checkpoint its name when all of it is written, so one that was interrupted does not count. What it cannot
see is a file that was damaged later; for that, every array has a fingerprint, which its values on any mesh have.
"""

import logging
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tenfold.base.copies import Copies
from tenfold.base.errors import CheckpointError, ConfigError
from tenfold.base.storage import OBJECT_STORES, local_directory
from tenfold.parallel.hosts import check_shared, gather, together
from tenfold.train.state import TrainState

logger = logging.getLogger(__name__)

_STATE, _HOST = "state", "host"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are made, and which are kept.

    Attributes:
        save_steps: steps between them; one is also made at the end, and when the run is told to stop.
        save_total_limit: how many of the latest are kept.
        metric_for_best_model: name of an evaluated number by which the best one is kept besides; None keeps none.
        greater_is_better: of that number.
    """

    save_steps: int = 500
    save_total_limit: int = 3
    metric_for_best_model: str | None = None
    greater_is_better: bool = False

    def __post_init__(self) -> None:
        if self.save_steps < 1 or self.save_total_limit < 1:
            raise ConfigError("save_steps and save_total_limit must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Restored:
    """What was in a checkpoint.

    Attributes:
        step: its name.
        state: on the devices.
        host: what the run knew besides.
    """

    step: int
    state: TrainState
    host: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run. All processes of a run call all methods.

    Args:
        directory: a path or a `file://` URI, made if need be, the same for all; or a `gs://`, `s3://` or `az://` URI,
            which each process copies its part to from a temporary directory of its own, behind the next steps.
        config: when, and which are kept.

    Raises:
        ConfigError: for another URI, or hosts that see different directories under the path.
        CheckpointError: if the object store cannot be read.
    """

    def __init__(self, directory: str, config: CheckpointConfig) -> None:
        self.config = config
        self.where = directory
        self._copies: Copies | None = None
        with ExitStack() as opened:
            if directory.partition("://")[0] in OBJECT_STORES:
                path = Path(opened.enter_context(TemporaryDirectory(prefix="tenfold-checkpoints-")))
                self._copies = opened.enter_context(closing(_open_copies(directory, path)))
            else:
                path = local_directory(directory)
                check_shared(path)
            self._manager = _open_manager(path, config, shared=self._copies is None)
            self._opened = opened.pop_all()
        self.directory = self._manager.directory

    def save(self, state: TrainState, host: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> None:
        """Saves a state under its step, unless that is saved already; returns when the state may change again.

        Args:
            state: arrays; on the devices.
            host: what else the run has to know to go on; for JSON, and the same in all processes.
            metrics: what was evaluated at this step.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        name = self.config.metric_for_best_model
        chosen = {name: metrics[name]} if name and metrics and name in metrics else None
        if self._copies is not None:
            self._copies.start(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(**{
                _STATE: ocp.args.StandardSave(state),
                _HOST: ocp.args.JsonSave({"run": dict(host), "arrays": describe(state)}),
            }),
            metrics=chosen,
            force=True,
        )  # fmt: skip

    def restore(self, target: TrainState) -> Restored | None:
        """The latest checkpoint that is whole; None if there is none at all. Later, damaged ones are moved aside.

        Args:
            target: shapes, dtypes and shardings of the state, as `abstract_state` gives them: those of any mesh.

        Raises:
            ConfigError: if the run that wrote it trained other arrays.
            CheckpointError: if there are checkpoints, and all are damaged.
        """
        self._manager.wait_until_finished()
        if self._copies is not None:
            self._copies.settle()
        self._manager.reload()
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[int] = []
        for step in steps:
            try:
                restored = self._restore(step, target)
            except (ConfigError, jax.errors.JaxRuntimeError):  # such as of another host, which is gone
                raise
            except Exception as error:  # noqa: BLE001 -- what damage makes Orbax and its stores raise is open
                logger.warning("the checkpoint of step %d is damaged and is passed over: %.200s", step, error)
                damaged.append(step)
                continue
            self._move_aside(damaged)
            return restored
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self.where} (steps {', '.join(map(str, steps))}) can be read. If the "
                "place can be reached, they are damaged: start anew in another directory"
            )
        return None

    def best_step(self) -> int | None:
        """The step of the best checkpoint by the metric; None if there is none."""
        return self._manager.best_step() if self.config.metric_for_best_model else None

    def wait(self) -> None:
        """Returns when everything saved is where it shall be; raises what went wrong there."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        if self._copies is not None:
            together(self._copies.finish)
            self._copies.prune()

    def close(self) -> None:
        """Waits, and ends the threads."""
        self._manager.close()
        self._opened.close()

    def _restore(self, step: int, target: TrainState) -> Restored:
        found = self._manager.restore(step, args=ocp.args.Composite(**{_HOST: ocp.args.JsonRestore()}))[_HOST]
        _check_arrays(found["arrays"], target, f"{self.where}/{step}")
        if (copies := self._copies) is not None:
            needed = {f"{_STATE}/{name}": boxes for name, boxes in _needed(target).items()}
            together(lambda: copies.fetch(step, needed))
        arguments = {_STATE: ocp.args.StandardRestore(target)}
        state = self._manager.restore(step, args=ocp.args.Composite(**arguments))[_STATE]
        prints = fingerprints(state)
        wrong = [name for name, about in found["arrays"].items() if about["fingerprint"] != prints[name]]
        if wrong:
            raise CheckpointError(f"{wrong[0]} and {len(wrong) - 1} other arrays are not what was saved")
        return Restored(step=step, state=state, host=found["run"])

    def _move_aside(self, steps: list[int]) -> None:
        if self._copies is not None:
            self._copies.remove(steps)
        elif jax.process_index() == 0:
            for step in steps:
                (self.directory / str(step)).rename(self.directory / f"damaged-{step}")
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are aside")
            self._manager.reload()


def _open_copies(uri: str, directory: Path) -> Copies:
    """The copies in an object store, of which the directory has those that are whole, but for their arrays."""
    copies = Copies(uri, directory, jax.process_index(), jax.process_count())
    found = together(copies.look)[0]
    copies.agree(gather(copies.begin(found)))
    return copies


def _open_manager(path: Path, config: CheckpointConfig, *, shared: bool) -> ocp.CheckpointManager:
    """Orbax's, of a directory that all processes share or of this one's own, where it writes no shared index."""
    processes = ocp.options.MultiprocessingOptions(primary_host=0 if shared else None)
    handlers: dict[str, Any] = {
        _STATE: ocp.StandardCheckpointHandler(use_ocdbt=shared, multiprocessing_options=processes),
        _HOST: ocp.JsonCheckpointHandler(multiprocessing_options=processes),
    }
    name, greater = config.metric_for_best_model, config.greater_is_better
    kept: list[Any] = [preservation_policy.LatestN(config.save_total_limit)]
    if name is not None:
        kept.append(
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics[name],
                reverse=not greater,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        best_fn=None if name is None else lambda metrics: metrics[name],
        best_mode="max" if greater else "min",
        preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
        create=shared,
        multiprocessing_options=processes,
    )
    return ocp.CheckpointManager(path, item_handlers=handlers, options=options)


def describe(state: TrainState) -> dict[str, dict[str, Any]]:
    """Shape, dtype and fingerprint of every array of a state, by its path."""
    prints = fingerprints(state)
    return {
        name: {"shape": list(x.shape), "dtype": x.dtype.name, "fingerprint": prints[name]} for name, x in _named(state)
    }


def fingerprints(tree: Any) -> dict[str, int]:
    """A number of 32 bits per array that changes with any of its bits, and not with the mesh that it lies on."""
    found = _fingerprints([x for _, x in _named(tree)])
    return {name: int(value) for (name, _), value in zip(_named(tree), found, strict=True)}


@jax.jit
def _fingerprints(arrays: list[Array]) -> list[UInt32[Array, ""]]:
    return [_fingerprint(x) for x in arrays]


def _fingerprint(x: Array) -> UInt32[Array, ""]:
    """The sum, modulo 2³², of the elements' bits times odd numbers that tell places apart: exact in any order."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)
    for dim, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    return (bits * (2 * place + 1) * jnp.uint32(2654435761)).sum(dtype=jnp.uint32)


def _check_arrays(found: Mapping[str, Any], target: TrainState, where: str) -> None:
    wanted = {name: (list(x.shape), x.dtype.name) for name, x in _named(target)}
    have = {name: (about["shape"], about["dtype"]) for name, about in found.items()}
    if have != wanted:
        name = next(name for name in (*wanted, *have) if have.get(name) != wanted.get(name))
        raise ConfigError(
            f"{where} was written by a run of another model or optimizer: it has {name} as "
            f"{have.get(name, 'nothing')}, and this run as {wanted.get(name, 'nothing')}. Use the options of that run, "
            "or another output directory"
        )


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _needed(target: TrainState) -> dict[str, list[list[tuple[int, int]]]]:
    """What this process's devices have of each array, by the name of its directory."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [
            [piece.indices(size)[:2] for piece, size in zip(box, x.shape, strict=True)]
            for box in x.sharding.addressable_devices_indices_map(x.shape).values()
        ]
        for path, x in jax.tree_util.tree_leaves_with_path(target)
    }
