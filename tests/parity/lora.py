"""Our side of the comparison of adapters' training with PEFT."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tenfold.models.family import resolve
from tenfold.nn import adapter_checkpoint, checkpoint
from tenfold.nn.lora import adapter_params
from tenfold.train.adapters import Frozen, adapted_loss
from tenfold.train.loss import full_training
from tenfold.train.optimizers import OptimizerConfig, make_optimizer
from tenfold.train.state import init_state
from tenfold.train.step import accumulate, make_step
from tests.parity.cases import make_weight
from tests.parity.lora_cases import ADAPTERS, STEPS, draw_tensor
from tests.parity.training import TOLERANCE, make_batch
from tests.parity.training_cases import CONFIG, OPTIMIZER


def assert_losses_agree(golden: Path, directory: Path) -> None:
    """Trains adapters drawn as those of a golden file, read from a file in PEFT's layout, and compares every step."""
    wanted = json.loads(golden.read_text())
    seed = wanted["seed"]
    base, adapter = directory / "base", directory / "adapter"
    base.mkdir()
    adapter.mkdir()
    weights = {name: make_weight(name, tuple(s), CONFIG, seed) for name, s in wanted["tensors"].items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    drawn = {name: draw_tensor(name, tuple(shape), seed) for name, shape in wanted["adapter_tensors"].items()}
    save_file(drawn, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    described = {"peft_type": "LORA", "target_modules": "all-linear", **ADAPTERS[golden.stem]}
    (adapter / "adapter_config.json").write_text(json.dumps(described))
    model = resolve(CONFIG)
    tree = model.params(stacked=True)
    config, adapters = adapter_checkpoint.load(adapter, tree)
    optimizer = make_optimizer(OptimizerConfig(schedule="cosine", **OPTIMIZER), STEPS, adapter_params(tree, config))
    loss = adapted_loss(full_training(model), config)
    step = jax.jit(make_step(accumulate(loss), optimizer, clip_norm=OPTIMIZER["max_grad_norm"]))
    state, frozen = init_state(optimizer, adapters), Frozen(checkpoint.load(base, tree, jnp.float32), {})
    losses = []
    for i in range(STEPS):
        state, metrics = step(state, frozen, make_batch(i, seed))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, wanted["losses"], rtol=0, atol=TOLERANCE)
