"""A run of a few steps on arrays that are spread over all processes, with checkpoints, as one of several processes:
for `test_checkpoints_on_hosts`.

python -m tests.train.checkpoints_on_hosts URI STEPS
"""

import os
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tenfold.base.errors import HostLostError
from tenfold.parallel.hosts import joined_hosts
from tenfold.parallel.sharding import make_mesh
from tenfold.train.checkpoints import CheckpointConfig, Checkpoints
from tenfold.train.state import TrainState


def begin() -> TrainState:
    """The state before the first step, on all devices of all processes."""
    mesh = make_mesh({"fsdp": jax.device_count()})
    spread, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "fsdp"), ()))

    def init() -> TrainState:
        w = jnp.arange(64, dtype=jnp.float32).reshape(4, 16) / 7
        return TrainState(jnp.asarray(0, jnp.int32), {"w": w, "b": w[0]}, {"m": w / 3})

    where: Any = (whole, {"w": spread, "b": whole}, {"m": spread})
    return jax.jit(init, out_shardings=TrainState(*where))()


def described(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


@jax.jit
def advance(state: TrainState) -> tuple[TrainState, jax.Array]:
    """A step whose every bit depends on all before it, and its loss."""
    m = 0.9 * state.opt_state["m"] + jnp.sin(state.trainable["w"])
    w = state.trainable["w"] - 0.1 * m
    b = state.trainable["b"] * jnp.float32(0.99)
    return TrainState(state.step + 1, {"w": w, "b": b}, {"m": m}), (w * w).sum() + b.sum()


def main(uri: str, steps: int) -> None:
    with joined_hosts():
        state = begin()
        checkpoints = Checkpoints(uri, CheckpointConfig(save_total_limit=3))
        found = checkpoints.restore(described(state))
        state = found.state if found else state
        print("from", int(state.step), flush=True)
        while int(state.step) < steps:
            state, loss = advance(state)
            print("loss", int(state.step), float(loss).hex(), flush=True)
            checkpoints.save(state, {"by": jax.process_count()})
        checkpoints.wait()
        checkpoints.close()


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except HostLostError:
        os._exit(75)  # jax would wait for the others
