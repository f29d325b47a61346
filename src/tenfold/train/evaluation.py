"""Measuring a loss on data that is held out of training."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tenfold.nn.param import Tree
from tenfold.parallel.layout import NOWHERE, Layout
from tenfold.train.batches import place
from tenfold.train.loss import Loss
from tenfold.train.step import cast


class Perplexity:
    """The mean loss over the tokens of some batches, and exp of it.

    Args:
        loss: of trainable and frozen weights on a batch.
        batches: of this process's rows, all of one shape.
        frozen: the weights that are not trained.
        layout: how a batch's rows lie.
        dtype: that the loss is computed in.
    """

    def __init__(
        self,
        loss: Loss,
        batches: Sequence[Any],
        *,
        frozen: Tree = None,
        layout: Layout = NOWHERE,
        dtype: str = "float32",
    ) -> None:
        self._frozen = {} if frozen is None else frozen
        self._batches = [place(batch, layout) for batch in batches]
        self._sums = jax.jit(lambda trainable, frozen, batch: loss(cast(trainable, jnp.dtype(dtype)), frozen, batch))

    def __call__(self, trainable: Tree) -> dict[str, float]:
        """{"eval_loss": in nats per token, "eval_perplexity": its exponential}"""
        sums = [self._sums(trainable, self._frozen, batch) for batch in self._batches]
        mean = sum(float(part.total) for part in sums) / max(sum(float(part.weight) for part in sums), 1e-6)
        return {"eval_loss": mean, "eval_perplexity": math.exp(min(mean, 700.0))}
