"""Our side of the comparison of training runs with torch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tenfold.data.packing import Rows, pack
from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tenfold.train.loss import full_training
from tenfold.train.optimizers import OptimizerConfig, make_optimizer
from tenfold.train.state import init_state
from tenfold.train.step import accumulate, make_step
from tests.parity.cases import make_weight
from tests.parity.training_cases import CONFIG, OPTIMIZER, ROW, STEPS, make_documents

TOLERANCE = 1e-4
ROWS = 10  # every batch is padded to as many, so that one program runs all steps; even, for two micro-batches


def make_batch(step: int, seed: int) -> Rows:
    rows = pack(((ids, [True] * len(ids)) for ids in make_documents(step, seed)), ROW)
    missing = ROWS - len(rows.tokens)
    assert missing >= 0
    return Rows(*(np.pad(array, ((0, missing), (0, 0))) for array in rows))


def assert_losses_agree(golden: Path, directory: Path) -> None:
    """Trains from the weights of a golden file, packed and in two micro-batches, and compares every step."""
    wanted = json.loads(golden.read_text())
    weights = {name: make_weight(name, tuple(s), CONFIG, wanted["seed"]) for name, s in wanted["tensors"].items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    model = resolve(CONFIG)
    declared = model.params(stacked=True)
    config = OptimizerConfig(schedule="cosine", **OPTIMIZER)
    optimizer = make_optimizer(config, STEPS, declared)
    step = jax.jit(make_step(accumulate(full_training(model), 2), optimizer, clip_norm=config.max_grad_norm))
    state = init_state(optimizer, checkpoint.load(directory, declared, jnp.float32))
    losses, norms = [], []
    for i in range(STEPS):
        state, metrics = step(state, {}, make_batch(i, wanted["seed"]))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    np.testing.assert_allclose(losses, wanted["losses"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(norms, wanted["grad_norms"], rtol=1e-3)
