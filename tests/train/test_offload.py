"""An optimizer's state that is kept on the host trains as one on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tenfold.parallel.sharding import make_mesh
from tenfold.train.loss import LossSum
from tenfold.train.offload import HOST_MEMORY, offloaded, on_host
from tenfold.train.state import init_state, state_shardings
from tenfold.train.step import accumulate, make_step

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


def loss(trainable: dict, frozen: dict, batch: jax.Array) -> LossSum:
    return LossSum(jnp.square(batch @ trainable["w"] - 1).sum(), jnp.float32(batch.shape[0]), {})


def test_training_is_the_same_and_the_moments_stay_on_the_host() -> None:
    optimizer, batch = optax.adam(0.1), jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
    where = {"w": NamedSharding(make_mesh({"fsdp": 2}), P("fsdp"))}
    weights = jax.device_put({"w": jnp.ones((4, 3))}, where)
    shardings = state_shardings(optimizer, weights, where)
    plain = make_step(accumulate(loss), optimizer)
    results = []
    for step, places in ((plain, shardings), (offloaded(plain, shardings), on_host(shardings))):
        state = jax.device_put(init_state(optimizer, weights, where), places)
        run = jax.jit(step, out_shardings=(places, None))
        for _ in range(3):
            state, _ = run(state, {}, batch)
        results.append(state)
    kept = results[1].opt_state[0].mu["w"]
    assert kept.sharding.memory_kind == HOST_MEMORY
    assert results[1].trainable["w"].sharding.memory_kind != HOST_MEMORY
    np.testing.assert_array_equal(results[0].trainable["w"], results[1].trainable["w"])
