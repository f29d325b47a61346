"""The hosts of one mesh: joined at the start, and missed when one is gone.

Every host runs the same program on its own devices. Where one dies, what the others compute together with it fails, or
its heartbeats stop; then they end too, and are started again together from their last checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from tenfold.base.errors import ConfigError, HostLostError
from tenfold.base.paths import cluster

HEARTBEAT_TIMEOUT_S = 30  # without a sign of a host, until the others give it up
SHUTDOWN_TIMEOUT_S = 10  # that a host waits for the others at its end


def join_hosts() -> int:
    """Joins the hosts that the environment names, and returns how many there are: 1 if it names none.

    To be called before jax is used. `JAX_COORDINATOR_ADDRESS` is host:port of the first process, `JAX_NUM_PROCESSES`
    says how many there are, and `JAX_PROCESS_ID` which of them this is.

    Raises:
        ConfigError: some of these variables are unset or no numbers, or the others cannot be reached.
    """
    found = cluster()
    if found is None:
        return 1
    coordinator, count, index = found
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"process {index} of {count} cannot join the others at {coordinator}: {error}") from error
    return count


@contextmanager
def watching_hosts() -> Iterator[None]:
    """Around what hosts compute together.

    Raises:
        HostLostError: in place of the device's own error, where there are several hosts.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise HostLostError(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on: another one is gone, or cannot be "
            f"reached. Start all of them again, from their last checkpoint. ({str(error).splitlines()[0][:300]})"
        ) from error
