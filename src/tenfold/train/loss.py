"""Losses as sums, so that micro-batches, rows and shards add up exactly; and the one of next-token prediction.

Dims: N rows, L tokens of a row, D model width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from tenfold.data.packing import Rows
from tenfold.kernels import native
from tenfold.models.family import Model
from tenfold.nn.float8 import in_float8
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
    params = in_float8(params, model.params(stacked=True)) if placement.fp8 else params
    return model.forward(place_layers(params, placement), tokens, positions, attend)


def hidden_states(params: Tree, model: Model, rows: Rows, placement: Placement = PLAIN) -> Float[Array, "N L D"]:
    """Hidden states of packed rows; attention is causal and stays within each segment."""
    hidden, _ = flat_states(params, model, rows, placement)
    return placement.layout.unflatten(hidden, rows.tokens.shape[0])


@jax.custom_jvp
def token_losses(logits: Float[Array, "T V"], targets: Int[Array, " T"]) -> Float[Array, " T"]:
    """The cross-entropy of each target, in nats."""
    return jax.nn.logsumexp(logits, axis=1) - _of_targets(logits, targets)


def _of_targets(logits: jax.Array, targets: jax.Array) -> jax.Array:
    # Compared, not picked, where that leaves a vocabulary that is spread over devices where it is.
    if native.serves_alone():
        return jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jnp.where(_is_target(logits, targets), logits, 0).sum(1)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return targets[:, None] == jnp.arange(logits.shape[1])[None]


@token_losses.defjvp
def _(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, Any]) -> tuple[jax.Array, jax.Array]:
    logits, targets = primals

    @partial(jax.checkpoint, prevent_cse=False)  # keeps nothing else that is as large as the logits
    def moved(logits: jax.Array, sums: jax.Array, moves: jax.Array) -> jax.Array:
        is_target = _is_target(logits, targets).astype(logits.dtype)
        return ((jnp.exp(logits - sums[:, None]) - is_target) * moves).sum(1)

    sums = jax.nn.logsumexp(logits, axis=1)
    return sums - _of_targets(logits, targets), moved(logits, sums, tangents[0])


def next_token_loss(params: Tree, model: Model, rows: Rows, placement: Placement = PLAIN) -> LossSum:
    """Weighted cross-entropy, in nats, of each token given those before it in its segment."""
    hidden, _ = flat_states(params, model, rows, placement)
    logits = model.logits(params, hidden)
    # The last token of a row is followed by none.
    following = (jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1))) for x in (rows.tokens, rows.weights))
    targets, weights = map(placement.layout.flatten, following)
    losses = token_losses(logits, targets)
    return LossSum((losses * weights).sum(), weights.sum(), {})


def full_training(model: Model, placement: Placement = PLAIN) -> Loss:
    """The loss of training every weight of a language model on packed rows: all are trainable, none frozen."""

    def loss(trainable: Tree, frozen: Tree, rows: Rows) -> LossSum:
        del frozen
        return next_token_loss(trainable, model, rows, placement)

    return loss


class StagedLoss(NamedTuple):
    """A loss in the parts that the stages of a pipeline compute; all are given the placement that says which.

    Attributes:
        pass_on: (trainable, frozen, batch, placement) -> what the stage passes on to the next.
        sums: likewise, the sums, by the last stage.
    """

    pass_on: Callable[[Tree, Tree, Any, Placement], Float[Array, "T D"]]
    sums: Callable[[Tree, Tree, Any, Placement], LossSum]


def in_stages(model: Model, loss: Callable[[Placement], Loss], read: Callable[[Any], Rows]) -> StagedLoss:
    """A loss of a model's weights, for a pipeline.

    Args:
        model: reads once what the loss is of.
        loss: for a placement.
        read: the rows that the model reads, of a batch.
    """

    def pass_on(trainable: Tree, frozen: Tree, batch: Any, placement: Placement) -> Float[Array, "T D"]:
        del frozen
        return flat_states(trainable, model, read(batch), placement)[1][0]

    def sums(trainable: Tree, frozen: Tree, batch: Any, placement: Placement) -> LossSum:
        return loss(placement)(trainable, frozen, batch)

    return StagedLoss(pass_on, sums)


def staged_full_training(model: Model) -> StagedLoss:
    """What `full_training` computes, for a pipeline."""
    return in_stages(model, partial(full_training, model), lambda rows: rows)
