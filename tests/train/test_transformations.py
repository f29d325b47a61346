"""Transformations of the exposed losses: gradients, per-example gradients, and products with the Hessian."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.data.packing import Rows
from tenfold.models.family import resolve
from tenfold.nn.lora import LoraConfig, adapter_params
from tenfold.nn.param import map_params
from tenfold.train.adapters import Frozen, adapted_loss
from tenfold.train.distill import distillation_loss
from tenfold.train.dpo import Pairs, dpo_loss
from tenfold.train.embed import Texts, contrastive_loss
from tenfold.train.example_batches import alone
from tenfold.train.loss import Loss, full_training

pytestmark = pytest.mark.slow

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 17,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MODEL = resolve(CONFIG)
LORA = LoraConfig(r=2)  # not DoRA, whose gradient takes lengths for constants that differences move


def draw(tree: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)

    def one(p: Any) -> jax.Array:
        drawn = random.normal(scale=0.2, size=p.shape)
        return jnp.asarray(drawn + (p.init == "ones"), jnp.float32)

    return map_params(one, tree)


def rows(count: int, seed: int) -> Rows:
    random = np.random.default_rng(seed)
    drawn = [random.integers(0, 17, random.integers(4, 9)).tolist() for _ in range(count)]
    return alone([(ids, [i > 1 for i in range(len(ids))]) for ids in drawn], 8, 0)


def case(name: str) -> tuple[Loss, Any, Any, Any]:
    """A loss, what it trains, what it does not, and a batch."""
    weights = draw(MODEL.params(stacked=True), 0)
    match name:
        case "next token":
            return full_training(MODEL), weights, {}, rows(3, 1)
        case "adapters":
            adapters = draw(adapter_params(MODEL.params(stacked=True), LORA), 2)
            return adapted_loss(full_training(MODEL), LORA), adapters, Frozen(weights, {}), rows(3, 1)
        case "preferences":
            reference = np.full((3, 2), -9.0, np.float32)
            return dpo_loss(MODEL, beta=0.5), weights, {}, Pairs(rows(3, 1), rows(3, 2), reference)
        case "distillation":
            teacher = draw(MODEL.params(stacked=True), 3)
            return distillation_loss(MODEL, MODEL, temperature=2.0), weights, {"teacher": teacher}, rows(3, 1)
        case _:
            passages = Rows(*(array.reshape(3, 2, 8) for array in rows(6, 2)))
            return contrastive_loss(MODEL, temperature=0.5), weights, {}, Texts(rows(3, 1), passages)


@pytest.mark.parametrize("name", ["next token", "adapters", "preferences", "distillation", "embeddings"])
def test_losses_are_transformed(name: str) -> None:
    """Per-example gradients add up, and the Hessian's products are what gradients differ by."""
    loss, trained, frozen, batch = case(name)
    grad = jax.grad(lambda trained, batch: loss(trained, frozen, batch).total)

    @jax.jit
    def transform(trained: Any, direction: Any) -> Any:
        whole, along = jax.jvp(lambda w: grad(w, batch), (trained,), (direction,))
        singles = jax.tree.map(lambda x: jnp.asarray(x)[:, None], batch)
        each = jax.vmap(grad, in_axes=(None, 0))(trained, singles)
        return whole, along, each

    direction = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape), trained)
    whole, along, each = transform(trained, direction)
    if name != "embeddings":  # whose examples are compared with each other
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a.sum(0), b, rtol=1e-3, atol=2e-4), each, whole)
    gradients = jax.jit(grad)

    def differ(step: float) -> Any:
        ahead, behind = (jax.tree.map(lambda w, d, s=s: w + s * d, trained, direction) for s in (step, -step))
        return jax.tree.map(lambda a, b: (a - b) / (2 * step), gradients(ahead, batch), gradients(behind, batch))

    wide, narrow = differ(2.5e-3), differ(1.25e-3)
    differences = jax.tree.map(lambda w, n: (4 * n - w) / 3, wide, narrow)  # Richardson's extrapolation
    found, wanted = (jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)]) for tree in (along, differences))
    assert float(jnp.linalg.norm(found)) > 1e-3
    assert float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)) < 2e-3
