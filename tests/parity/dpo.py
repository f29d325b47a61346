"""Our side of the comparison of preference losses with TRL."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from tenfold.models.family import Model, resolve
from tenfold.nn import checkpoint
from tenfold.train.dpo import Pairs, dpo_loss, reference_logprobs
from tenfold.train.example_batches import alone
from tests.parity.cases import make_weight
from tests.parity.dpo_cases import LOSSES, REFERENCE_SEED, ROW, make_pairs
from tests.parity.training_cases import CONFIG

TOLERANCE = 1e-4


def load_drawn(model: Model, shapes: dict[str, list[int]], seed: int, directory: Path) -> Any:
    weights = {name: make_weight(name, tuple(shape), CONFIG, seed) for name, shape in shapes.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return checkpoint.load(directory, model.params(stacked=True), jnp.float32)


def assert_losses_agree(golden: Path, directory: Path) -> None:
    """Every kind of loss, and the norm of its gradient."""
    wanted = json.loads(golden.read_text())
    model, seed = resolve(CONFIG), wanted["seed"]
    examples = [
        [([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)) for answer in answers]
        for prompt, *answers in make_pairs(seed)
    ]
    chosen, rejected = (alone([pair[i] for pair in examples], ROW, 0) for i in range(2))
    reference = load_drawn(model, wanted["tensors"], seed + REFERENCE_SEED, directory)
    pairs = Pairs(chosen, rejected, reference_logprobs(reference, model, (chosen, rejected)))
    weights = load_drawn(model, wanted["tensors"], seed, directory)
    for kind, options in LOSSES.items():
        loss = dpo_loss(model, kind=kind, **options)
        value, gradient = jax.jit(jax.value_and_grad(lambda w, loss=loss: loss(w, {}, pairs).mean))(weights)
        expected = wanted["losses"][kind]
        np.testing.assert_allclose(float(value), expected["loss"], rtol=0, atol=TOLERANCE, err_msg=kind)
        np.testing.assert_allclose(float(optax.tree.norm(gradient)), expected["grad_norm"], rtol=1e-3, err_msg=kind)
