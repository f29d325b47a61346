"""Losses as sums, so that micro-batches, rows and shards add up exactly; and the one of next-token prediction.

Dims: N rows, L tokens of a row, D model width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32

from tenfold.data.packing import Rows
from tenfold.models.family import Model
from tenfold.nn.packed import packed_attend
from tenfold.nn.param import Tree


class LossSum(NamedTuple):
    """What a loss adds up over a batch.

    Attributes:
        total: the sum of weighted losses.
        weight: the sum of their weights.
        metrics: further sums, each divided by `weight` when it is reported.
    """

    total: Float32[Array, ""]
    weight: Float32[Array, ""]
    metrics: dict[str, Array]

    @property
    def mean(self) -> Float32[Array, ""]:
        """The weighted mean of the loss; 0 where nothing has a weight."""
        return self.total / jnp.maximum(self.weight, 1e-6)


Loss = Callable[[Tree, Tree, Any], LossSum]
"""(trainable, frozen, batch) -> sums. Pure, so that `grad`, `vmap` and Hessian-vector products of it work.

The batch is a pytree of arrays whose leading dim is rows.
"""


def hidden_states(params: Tree, model: Model, rows: Rows) -> Float[Array, "N L D"]:
    """Hidden states of packed rows; attention is causal and stays within each segment."""
    N, L = rows.tokens.shape

    attend = packed_attend(jnp.asarray(rows.segment_ids))
    tokens, positions = jnp.asarray(rows.tokens), jnp.asarray(rows.positions)
    hidden, _ = model.forward(params, tokens.reshape(-1), positions.reshape(-1), attend)
    return hidden.reshape(N, L, -1)


def next_token_loss(params: Tree, model: Model, rows: Rows) -> LossSum:
    """Weighted cross-entropy, in nats, of each token given those before it in its segment."""
    hidden = hidden_states(params, model, rows)[:, :-1]
    logits = model.logits(params, hidden.reshape(-1, hidden.shape[-1]))
    targets, weights = rows.tokens[:, 1:].reshape(-1), rows.weights[:, 1:].reshape(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return LossSum((losses * weights).sum(), weights.sum(), {})


def full_training(model: Model) -> Loss:
    """The loss of training every weight of a language model on packed rows: all are trainable, none frozen."""

    def loss(trainable: Tree, frozen: Tree, rows: Rows) -> LossSum:
        del frozen
        return next_token_loss(trainable, model, rows)

    return loss
