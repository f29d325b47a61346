"""Plans of steps on meshes that this machine has not."""

import json
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import optax
import pytest

from tenfold.base.errors import ConfigError
from tenfold.data.packing import Rows
from tenfold.models.family import resolve
from tenfold.nn import param as params
from tenfold.parallel.sharding import make_mesh
from tenfold.train.loss import staged_full_training
from tenfold.train.parallelism import Parallelism
from tenfold.train.plan import Plan, plan_step, use_virtual_devices
from tenfold.train.state import abstract_state
from tenfold.train.step import make_step
from tests.train.cases import MODELS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("mixed_dtypes")]

LENGTH = 64


def make_plan(parallelism: Parallelism, rows: int, model_changes: dict[str, Any] | None = None) -> Plan:
    model = resolve(MODELS["llama"] | (model_changes or {}))
    placement = parallelism.make_placement()
    layout = placement.layout
    layout.check(rows, LENGTH, parallelism.micro_batches)
    tree = model.params(stacked=True)
    shardings = params.shardings(tree, layout.mesh)
    grad = parallelism.make_grad(staged_full_training(model), placement, shardings)
    optimizer = optax.adam(1e-3)
    state = abstract_state(optimizer, params.abstract(tree, np.float32), shardings)
    whole = jax.ShapeDtypeStruct((rows, LENGTH), np.int32, sharding=layout.rows)
    batch = Rows(whole, whole, whole, jax.ShapeDtypeStruct((rows, LENGTH), np.float32, sharding=layout.rows))
    return plan_step(make_step(grad, optimizer), state, {}, batch, layout, parallelism.make_schedule(layout))


def test_a_plan_counts_what_devices_hold_and_send() -> None:
    plan = make_plan(Parallelism(mesh="data=2,tensor=2", remat="full"), 4)
    tree = resolve(MODELS["llama"]).params(stacked=True)
    mesh = make_mesh({"data": 2, "tensor": 2})
    held = params.device_nbytes(tree, np.float32, mesh)
    assert plan.weights == plan.gradients == held
    assert held < params.nbytes(tree, np.float32) * 0.6
    assert 2 * held <= plan.optimizer < 2 * held + 100  # two moments, and a count
    assert plan.frozen == 0
    # Each device adds up all gradients that it has, and the sums of the loss.
    assert held <= plan.traffic["all-reduce", ("data",)] < 1.1 * held + 100
    # Forwards, again for the gradient, and backwards: two products' results of every layer for all of its tokens.
    activations = 4 * 2 * LENGTH * 16
    assert plan.traffic["all-reduce", ("tensor",)] > 4 * 2 * 2 * activations
    assert plan.activations > 4 * activations  # what goes into each layer
    table = str(plan)
    assert "4 devices: data=2 · tensor=2" in table
    assert "all-reduce along data" in table
    assert "pipeline" not in table


@pytest.mark.slow
def test_a_plan_for_hundreds_of_devices() -> None:
    """Of a model that is wide enough to be split so often; in a process that has no devices yet."""
    code = "from tests.train.test_plan import plan_for_hundreds; plan_for_hundreds()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    plan = json.loads(done.stdout)
    assert plan["bubble"] == pytest.approx(3 / (8 + 3))
    assert plan["weights"] < 2e9 * 4 / 256
    assert plan["permuted"] > 0


def plan_for_hundreds() -> None:
    use_virtual_devices(512)
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    changes = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000,
    }  # fmt: skip
    mesh = "pipeline=4,data=2,fsdp=16,tensor=4"
    plan = make_plan(Parallelism(mesh=mesh, remat="full", schedule="1f1b", micro_batches=8), 512, changes)
    print(plan, file=sys.stderr)
    permuted = plan.traffic["collective-permute", ("pipeline",)]
    print(json.dumps({"bubble": plan.bubble, "weights": plan.weights, "permuted": permuted}))


def test_a_process_that_has_devices_gets_no_others() -> None:
    assert jax.devices()
    with pytest.raises(ConfigError, match="a process of its own"):
        use_virtual_devices(8)
