"""The optimizer's state in the memory of the host: a step fetches it, and puts it back.

For Adam that frees two thirds of what a weight takes in float32, for the time of a transfer each way in every step.
"""

from typing import Any

import jax
from jax.sharding import Sharding

from tenfold.base.errors import ConfigError
from tenfold.nn.param import Tree
from tenfold.train.state import TrainState
from tenfold.train.step import Step

HOST_MEMORY = "pinned_host"


def on_host(shardings: TrainState) -> TrainState:
    """The same places, with the optimizer's state in the memory of their devices' host.

    Raises:
        ConfigError: if the devices have no such memory.
    """

    def move(sharding: Sharding) -> Sharding:
        device = next(iter(sharding.addressable_devices))
        kinds = {memory.kind for memory in device.addressable_memories()}
        if HOST_MEMORY not in kinds:
            raise ConfigError(
                f"devices of the platform {device.platform!r} have no memory {HOST_MEMORY!r}, so the optimizer's state "
                "cannot be kept there: leave it on the devices"
            )
        return sharding.with_memory_kind(HOST_MEMORY)

    return shardings._replace(opt_state=jax.tree.map(move, shardings.opt_state))


def offloaded(step: Step, shardings: TrainState) -> Step:
    """A step whose state lies as `on_host(shardings)` says, before it and after it.

    Raises:
        ConfigError: as `on_host`.
    """
    host = on_host(shardings)

    def run(state: TrainState, frozen: Tree, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        fetched = state._replace(opt_state=jax.device_put(state.opt_state, shardings.opt_state))
        state, metrics = step(fetched, frozen, batch)
        return state._replace(opt_state=jax.device_put(state.opt_state, host.opt_state)), metrics

    return run
