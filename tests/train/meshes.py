"""Trains tiny models on meshes of eight virtual CPU devices, and says what came of it as JSON: for `test_meshes`.

It is run as a process of its own, because the number of devices is fixed when jax is first used. What is compiled runs
for milliseconds, so it is not optimised.

    python -m tests.train.meshes CASE...    each a model and the fields of `Parallelism`, as JSON
"""

import json
import os
import sys
from typing import Any

os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax
import numpy as np
import optax

from tenfold.data.packing import Rows
from tenfold.models.family import resolve
from tenfold.nn import param as params
from tenfold.nn.param import Tree
from tenfold.train.loss import staged_full_training
from tenfold.train.parallelism import Parallelism
from tenfold.train.state import init_state
from tenfold.train.step import make_step
from tests.train.cases import MODELS, VOCAB, Case

STEPS, ROWS, LENGTH = 20, 16, 16


def make_batches() -> list[Rows]:
    """Rows of two or three segments each, and some padding."""
    rng = np.random.default_rng(0)
    batches: list[Rows] = []
    for _ in range(3):
        cuts = np.sort(rng.integers(1, LENGTH, (ROWS, 2)), axis=1)
        at = np.arange(LENGTH)[None]
        segments = 1 + (at >= cuts[:, :1]) + (at >= cuts[:, 1:])
        segments = np.where(at >= LENGTH - 2, 0, segments).astype(np.int32)
        fresh = np.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        starts = np.maximum.accumulate(np.where(fresh, at, 0), axis=1)
        weights = ((segments > 0) & ~fresh).astype(np.float32)
        tokens = rng.integers(0, VOCAB, (ROWS, LENGTH), dtype=np.int32)
        batches.append(Rows(tokens, segments, (at - starts).astype(np.int32), weights))
    return batches


def train(case: Case) -> dict[str, Any]:
    """The losses of 20 steps, the collectives of the compiled step, and the bytes of weights on each device."""
    model, parallelism = resolve(MODELS[case.model]), case.parallelism
    placement = parallelism.make_placement()
    layout = placement.layout
    layout.check(ROWS, LENGTH, parallelism.micro_batches)
    tree = model.params(stacked=True)
    placed = params.shardings(tree, layout.mesh)
    weights = jax.device_put(draw(tree), placed)
    optimizer = optax.adamw(1e-2)
    state = init_state(optimizer, weights, placed)
    step = make_step(parallelism.make_grad(staged_full_training(model), placement, placed), optimizer)
    batches = [jax.device_put(batch, layout.rows) for batch in make_batches()]
    compiled = jax.jit(step, donate_argnums=0).lower(state, {}, batches[0]).compile()
    losses: list[float] = []
    for i in range(STEPS):
        state, metrics = compiled(state, {}, batches[i % len(batches)])
        losses.append(float(metrics["loss"]))
    held = {device.id: 0 for device in layout.mesh.devices.flat}
    for array in jax.tree.leaves(state.trainable):
        for shard in array.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return {"losses": losses, "hlo": compiled.as_text(), "held": sorted(held.values())}


def draw(tree: Tree) -> Tree:
    """Weights from numpy: compiling their initialisation would take longer than training them."""
    rng = np.random.default_rng(1)
    return params.map_params(
        lambda p: (
            rng.normal(0, 0.2, p.shape).astype(np.float32) if p.init == "normal" else np.ones(p.shape, np.float32)
        ),
        tree,
    )


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "standard")  # optax multiplies floats with integers
    for text in sys.argv[1:]:
        model, fields = json.loads(text)
        print(json.dumps(train(Case(model, Parallelism(**fields)))), flush=True)
