"""A step against its formula: sums over micro-batches, one division, clipping, and float32 masters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tenfold.nn.param import param
from tenfold.parallel.sharding import make_mesh
from tenfold.train.loss import LossSum
from tenfold.train.optimizers import OPTIMIZERS, OptimizerConfig, make_optimizer
from tenfold.train.state import abstract_state, init_state
from tenfold.train.step import accumulate, make_step

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


def squares(trainable: Any, frozen: Any, batch: Any) -> LossSum:
    """Weighted squared errors of a line, with a metric: the sum of absolute errors."""
    x, y, weight = batch
    errors = x @ trainable["w"] + frozen["b"] - y
    return LossSum((weight * errors**2).sum(), weight.sum(), {"absolute": (weight * abs(errors)).sum()})


def make_batch(rows: int = 12) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(rows, 3)), rng.normal(size=rows), rng.integers(0, 3, rows)
    return x.astype(np.float32), y.astype(np.float32), weight.astype(np.float32)


def by_hand(w: np.ndarray, b: float) -> tuple[float, float, np.ndarray]:
    x, y, weight = make_batch()
    errors = x @ w + b - y
    total = weight.sum()
    return (weight * errors**2).sum() / total, (weight * abs(errors)).sum() / total, 2 * (weight * errors) @ x / total


W, B = np.asarray([0.5, -1.0, 2.0], np.float32), np.float32(0.3)


@pytest.mark.parametrize("micro_batches", [1, 3, 12])
def test_micro_batches_of_unequal_weights_add_up(micro_batches: int) -> None:
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_step(accumulate(squares, micro_batches), optimizer, clip_norm=None))
    state, metrics = step(init_state(optimizer, {"w": jnp.asarray(W)}), {"b": jnp.asarray(B)}, make_batch())
    loss, absolute, gradient = by_hand(W, B)
    np.testing.assert_allclose(state.trainable["w"], W - 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["absolute"], absolute, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(gradient), rtol=1e-5)
    assert int(state.step) == 1


def test_a_long_gradient_is_cut_to_the_norm_and_a_short_one_is_left() -> None:
    optimizer = optax.sgd(1.0)
    _, _, gradient = by_hand(W, B)
    length = float(np.linalg.norm(gradient))
    for limit, scale in ((length / 2, 0.5), (length * 2, 1.0)):
        step = jax.jit(make_step(accumulate(squares), optimizer, clip_norm=limit))
        state, metrics = step(init_state(optimizer, {"w": jnp.asarray(W)}), {"b": jnp.asarray(B)}, make_batch())
        np.testing.assert_allclose(state.trainable["w"], W - scale * gradient, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], length, rtol=1e-5)  # as it was before


def test_a_batch_without_weights_changes_nothing() -> None:
    optimizer = optax.sgd(0.1)
    x, y, weight = make_batch()
    step = jax.jit(make_step(accumulate(squares), optimizer))
    state, metrics = step(init_state(optimizer, {"w": jnp.asarray(W)}), {"b": jnp.asarray(B)}, (x, y, 0 * weight))
    np.testing.assert_array_equal(state.trainable["w"], W)
    assert float(metrics["loss"]) == 0


def test_masters_keep_what_bfloat16_cannot_hold() -> None:
    """A step of 1e-4 from 1.0 is lost in bfloat16, whose next number is 1.0078; in the masters it adds up."""
    seen: list[Any] = []

    def loss(trainable: Any, frozen: Any, batch: Any) -> LossSum:
        seen.append(trainable["w"].dtype)
        return LossSum(trainable["w"].astype(jnp.float32).sum(), jnp.ones(()), {})

    optimizer = optax.sgd(1e-4)
    step = jax.jit(make_step(accumulate(loss), optimizer, compute_dtype=jnp.bfloat16))
    state = init_state(optimizer, {"w": jnp.ones(1)})
    for _ in range(10):
        state, _ = step(state, {}, ())
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(state.trainable["w"], [1 - 1e-3], rtol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_lies_like_its_weights(name: str) -> None:
    declared = {"w": param((8, 4), "embed mlp", "w", inputs="embed"), "norm": param((8,), "embed", "norm")}
    optimizer = make_optimizer(OptimizerConfig(optimizer=name), 10, declared)
    mesh = make_mesh({"fsdp": 2, "tensor": 2})
    weights = {"w": jnp.ones((8, 4)), "norm": jnp.ones(8)}
    shardings = {
        "w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
        "norm": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    state = init_state(optimizer, jax.device_put(weights, shardings), shardings)
    wanted = abstract_state(optimizer, weights, shardings)
    for kept, declared in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert kept.sharding.is_equivalent_to(declared.sharding, kept.ndim)
        assert kept.shape == declared.shape
        assert kept.shape != (8, 4) or kept.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert sum(kept.shape == (8, 4) for kept in jax.tree.leaves(state)) == {"adamw": 3, "adafactor": 2, "muon": 2}[name]
