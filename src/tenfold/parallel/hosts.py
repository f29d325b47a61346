"""The hosts of one mesh: joined at the start, and missed when one is gone.

Every host runs the same program on its own devices. Where one dies, what the others compute together with it fails, or
its heartbeats stop; then they end too, and are started again together from their last checkpoint.
"""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tenfold.base.errors import CheckpointError, ConfigError, HostLostError
from tenfold.base.paths import cluster

HEARTBEAT_TIMEOUT_S = 30  # without a sign of a host, until the others give it up
SHUTDOWN_TIMEOUT_S = 60  # that a host waits at its end for the others, which are done as well


@contextmanager
def joined_hosts() -> Iterator[int]:
    """Around all that this process computes with the hosts that the environment names; gives how many there are.

    To be entered before jax is used. `JAX_COORDINATOR_ADDRESS` is host:port of the first process, `JAX_NUM_PROCESSES`
    says how many there are, and `JAX_PROCESS_ID` which of them this is. If the environment names none, there is one.
    The block ends when it has ended on all hosts, unless it raises.

    Raises:
        ConfigError: some of these variables are unset or no numbers, or jax was used before.
        HostLostError: another host is gone, or does not come. Where jax itself is the first to see that, it ends the
            process at once, by SIGABRT.
    """
    found = cluster()
    if found is None:
        yield 1
        return
    coordinator, count, index = found
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method="deactivate",  # of a scheduler, which would give each process a single device
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except jax.errors.JaxRuntimeError as error:
        raise HostLostError(f"process {index} of {count} cannot join the others at {coordinator}: {error}") from error
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"process {index} of {count} cannot join others: {error}") from error
    try:
        yield count
        if count > 1:
            multihost_utils.sync_global_devices("all hosts are done")  # while the first one writes the model
    except jax.errors.JaxRuntimeError as error:
        if count == 1:
            raise
        raise HostLostError(
            f"process {index} of {count} cannot go on: another one is gone, or cannot be reached. Start all of them "
            f"again, from their last checkpoint. ({str(error).splitlines()[0][:300]})"
        ) from error


def check_shared(directory: Path) -> None:
    """Raises ConfigError unless what the first process writes to a directory, made if need be, is there for all."""
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
            "take one on a network volume, or the URI of an object store (--checkpoint-dir)"
        )


def together(work: Callable[[], bytes]) -> list[bytes]:
    """What the work of each process gives, in all of them; raises CheckpointError in all if it does in one."""
    try:
        answers = gather(b"+" + work())
    except CheckpointError as error:
        answers = gather(b"-" + str(error).encode())
    for answer in answers:
        if answer.startswith(b"-"):
            raise CheckpointError(answer[1:].decode())
    return [answer[1:] for answer in answers]


def gather(value: bytes) -> list[bytes]:
    """What each process has, in their order, in all of them."""
    if jax.process_count() == 1:
        return [value]
    lengths = multihost_utils.process_allgather(np.asarray(len(value)))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(value)] = np.frombuffer(value, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
