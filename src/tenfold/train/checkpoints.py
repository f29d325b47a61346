"""Checkpoints of a run: written by Orbax behind the next steps, whole or not at all, and checked when they are read.

Orbax gives a checkpoint its name when all of it is written, so one that was interrupted does not count. What it cannot
see is a file that was damaged later; for that, every array has a fingerprint, which its values on any mesh have.
"""

import logging
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tenfold.base.copies import Copies
from tenfold.base.errors import CheckpointError, ConfigError
from tenfold.base.storage import OBJECT_STORES
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
        directory: a path or a `file://` URI, made if need be; or a `gs://`, `s3://` or `az://` URI, which they
            are copied to from a temporary directory, behind the next steps.
        config: when, and which are kept.

    Raises:
        ConfigError: for another URI, an object store and several processes, or hosts that see different directories
            under the path.
        CheckpointError: if the object store cannot be read.
    """

    def __init__(self, directory: str, config: CheckpointConfig) -> None:
        self.config = config
        self.where = directory
        self._copies: Copies | None = None
        with ExitStack() as opened:
            if directory.partition("://")[0] in OBJECT_STORES:
                path = Path(opened.enter_context(TemporaryDirectory(prefix="tenfold-checkpoints-")))
                self._copies = opened.enter_context(closing(_fetch_copies(directory, path)))
            else:
                path = _find(directory)
                _check_shared(path)
            self._manager = ocp.CheckpointManager(path, options=_options(config))
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
        self._manager.save(
            step,
            args=ocp.args.Composite(**{
                _STATE: ocp.args.StandardSave(state),
                _HOST: ocp.args.JsonSave({"run": dict(host), "arrays": describe(state)}),
            }),
            metrics=chosen,
            force=True,
        )  # fmt: skip
        if self._copies is not None:
            self._copies.start(step)

    def restore(self, target: TrainState) -> Restored | None:
        """The latest checkpoint that is whole; None if there is none at all. Later, damaged ones are moved aside.

        Args:
            target: shapes, dtypes and shardings of the state, as `abstract_state` gives them: those of any mesh.

        Raises:
            ConfigError: if the run that wrote it trained other arrays.
            CheckpointError: if there are checkpoints, and all are damaged.
        """
        self._manager.wait_until_finished()
        self._manager.reload()
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[int] = []
        for step in steps:
            try:
                restored = self._restore(step, target)
            except ConfigError:
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
            self._copies.finish()

    def close(self) -> None:
        """Waits, and ends the threads."""
        self._manager.close()
        self._opened.close()

    def _restore(self, step: int, target: TrainState) -> Restored:
        found = self._manager.restore(step, args=ocp.args.Composite(**{_HOST: ocp.args.JsonRestore()}))[_HOST]
        _check_arrays(found["arrays"], target, f"{self.where}/{step}")
        arguments = {_STATE: ocp.args.StandardRestore(target)}
        state = self._manager.restore(step, args=ocp.args.Composite(**arguments))[_STATE]
        prints = fingerprints(state)
        wrong = [name for name, about in found["arrays"].items() if about["fingerprint"] != prints[name]]
        if wrong:
            raise CheckpointError(f"{wrong[0]} and {len(wrong) - 1} other arrays are not what was saved")
        return Restored(step=step, state=state, host=found["run"])

    def _move_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                (self.directory / str(step)).rename(self.directory / f"damaged-{step}")
            if self._copies is not None:
                self._copies.remove(steps)
        if steps:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are aside")
            self._manager.reload()


def _fetch_copies(uri: str, directory: Path) -> Copies:
    """The copies in an object store, of which the directory has those that are whole."""
    if jax.process_count() > 1:
        raise ConfigError(
            f"{uri}: several processes write one checkpoint, so they need a directory that all of them have, on a "
            "shared file system; name that"
        )
    copies = Copies(uri, directory)
    copies.fetch()
    return copies


def _find(directory: str) -> Path:
    """The directory that a path or a `file://` URI names."""
    scheme, is_uri, _ = directory.partition("://")
    if not is_uri:
        return Path(directory).absolute()
    if scheme == "file":
        return Path(url2pathname(urlsplit(directory).path))
    known = ", ".join(f"{known}://" for known in ("file", *OBJECT_STORES))
    raise ConfigError(f"{directory}: checkpoints are not written to {scheme}://; name a directory or {known}")


def _options(config: CheckpointConfig) -> ocp.CheckpointManagerOptions:
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
    return ocp.CheckpointManagerOptions(
        best_fn=None if name is None else lambda metrics: metrics[name],
        best_mode="max" if greater else "min",
        preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True,
    )


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


def _check_shared(directory: Path) -> None:
    """Raises ConfigError unless what the first process writes to a directory is there for all."""
    if jax.process_count() == 1:
        return
    mark = directory / f".seen-{gather(uuid.uuid4().hex.encode())[0].decode()}"
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        mark.touch()
    multihost_utils.sync_global_devices("the mark is there")
    seen = gather(str(int(mark.exists())).encode())
    if jax.process_index() == 0:
        mark.unlink()
    if b"0" in seen:
        raise ConfigError(
            f"host {seen.index(b'0')} of {len(seen)} does not share {directory}, where checkpoints are to be written: "
            "take an output on a network volume"
        )


def gather(value: bytes) -> list[bytes]:
    """What each process has, in their order, in all of them."""
    if jax.process_count() == 1:
        return [value]
    lengths = multihost_utils.process_allgather(np.asarray(len(value)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(value)] = np.frombuffer(value, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
