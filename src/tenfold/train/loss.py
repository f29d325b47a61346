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
from tenfold.nn.stack import PLAIN, Placement, place_layers


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


def flat_states(
    params: Tree, model: Model, rows: Rows, placement: Placement = PLAIN
) -> tuple[Float[Array, "T D"], Any]:
    """Hidden states of the tokens of packed rows, in the order of the placement's layout (T = N · L).

    Attention is causal and stays within each segment. Of one stage of a pipeline, also returns what it passes on.
    """
    layout = placement.layout
    attend = packed_attend(jnp.asarray(rows.segment_ids), layout)
    tokens, positions = (layout.flatten(jnp.asarray(x)) for x in (rows.tokens, rows.positions))
    return model.forward(place_layers(params, placement), tokens, positions, attend)


def hidden_states(params: Tree, model: Model, rows: Rows, placement: Placement = PLAIN) -> Float[Array, "N L D"]:
    """Hidden states of packed rows; attention is causal and stays within each segment."""
    hidden, _ = flat_states(params, model, rows, placement)
    return placement.layout.unflatten(hidden, rows.tokens.shape[0])


def next_token_loss(params: Tree, model: Model, rows: Rows, placement: Placement = PLAIN) -> LossSum:
    """Weighted cross-entropy, in nats, of each token given those before it in its segment."""
    hidden, _ = flat_states(params, model, rows, placement)
    logits = model.logits(params, hidden)
    # The last token of a row is followed by none.
    following = (jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1))) for x in (rows.tokens, rows.weights))
    targets, weights = map(placement.layout.flatten, following)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return LossSum((losses * weights).sum(), weights.sum(), {})


def full_training(model: Model, placement: Placement = PLAIN) -> Loss:
    """The loss of training every weight of a language model on packed rows: all are trainable, none frozen."""

    def loss(trainable: Tree, frozen: Tree, rows: Rows) -> LossSum:
        del frozen
        return next_token_loss(trainable, model, rows, placement)

    return loss
