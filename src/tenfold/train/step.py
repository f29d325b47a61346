"""One step of training: gradients summed over micro-batches, divided once, clipped, and given to the optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from tenfold.nn.param import Tree
from tenfold.train.loss import Loss, LossSum
from tenfold.train.state import TrainState

Grad = Callable[[Tree, Tree, Any], tuple[LossSum, Tree]]
"""(trainable, frozen, batch) -> the loss's sums, and the float32 gradients of its `total`."""

Step = Callable[[TrainState, Tree, Any], tuple[TrainState, dict[str, Array]]]
"""(state, frozen, batch) -> the next state, and what is reported: float32 scalars."""


def accumulate(loss: Loss, micro_batches: int = 1) -> Grad:
    """The gradient of a loss, computed for one part of the rows after the other and summed in float32.

    A batch's rows must be a multiple of `micro_batches`. Micro-batch m has the rows m, m + micro_batches, ...: where
    rows are spread over devices in contiguous parts, each part has a share of every micro-batch.
    """

    def one(trainable: Tree, frozen: Tree, batch: Any) -> tuple[LossSum, Tree]:
        def total(trainable: Tree) -> tuple[jax.Array, LossSum]:
            sums = loss(trainable, frozen, batch)
            return sums.total, sums

        gradients, sums = jax.grad(total, has_aux=True)(trainable)
        return sums, jax.tree.map(lambda g: g.astype(jnp.float32), gradients)

    def grad(trainable: Tree, frozen: Tree, batch: Any) -> tuple[LossSum, Tree]:
        if micro_batches == 1:
            return one(trainable, frozen, batch)
        parts = jax.tree.map(lambda x: deal(x, micro_batches), batch)

        def body(summed: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, summed, one(trainable, frozen, part)), None

        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(one, trainable, frozen, first))
        summed, _ = jax.lax.scan(body, zeros, parts)
        return summed

    return grad


def deal(x: jax.Array, parts: int) -> jax.Array:
    """[R, ...] -> [parts, R / parts, ...], like cards."""
    return jnp.asarray(x).reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def make_step(
    grad: Grad,
    optimizer: optax.GradientTransformation,
    *,
    clip_norm: float | None = 1.0,
    compute_dtype: DTypeLike = jnp.float32,
) -> Step:
    """One step of an optimizer, to be jitted with its state donated.

    Args:
        grad: of the loss.
        optimizer: is given the gradient of the mean loss, after clipping.
        clip_norm: the gradient's global norm is cut to this (Pascanu et al., 2013); None leaves it.
        compute_dtype: that the loss is computed in; the trained weights stay float32 and are cast at every step.
    """

    def step(state: TrainState, frozen: Tree, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        sums, gradients = grad(cast(state.trainable, compute_dtype), frozen, batch)
        weight = jnp.maximum(sums.weight, 1e-6)
        gradients = jax.tree.map(lambda g: g / weight, gradients)
        norm = optax.tree.norm(gradients)
        if clip_norm is not None:
            scale = clip_scale(norm, clip_norm)
            gradients = jax.tree.map(lambda g: g * scale, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {name: total / weight for name, total in sums.metrics.items()}
        metrics |= {"loss": sums.mean, "grad_norm": norm, "weight": sums.weight}
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return step


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
    """The tree with its floating-point arrays in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def clip_scale(norm: Float32[Array, ""], clip_norm: float) -> Float32[Array, ""]:
    """What a gradient of this norm is multiplied with, so that its norm is at most `clip_norm`."""
    return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-9))
