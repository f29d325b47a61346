"""The loss of next-token prediction over packed rows."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tenfold.models.family import Model
from tenfold.nn.packed import packed_attend
from tenfold.nn.param import Tree
from tenfold.train.packing import Rows


def hidden_states(params: Tree, model: Model, rows: Rows) -> Float[Array, "N L D"]:
    """Hidden states of packed rows; attention is causal and stays within each segment."""
    N, L = rows.tokens.shape

    attend = packed_attend(jnp.asarray(rows.segment_ids))
    tokens, positions = jnp.asarray(rows.tokens), jnp.asarray(rows.positions)
    hidden, _ = model.forward(params, tokens.reshape(-1), positions.reshape(-1), attend)
    return hidden.reshape(N, L, -1)


def next_token_loss(params: Tree, model: Model, rows: Rows) -> Float[Array, ""]:
    """Weighted mean cross-entropy, in nats, of each token given those before it in its segment."""
    hidden = hidden_states(params, model, rows)[:, :-1]
    logits = model.logits(params, hidden.reshape(-1, hidden.shape[-1]))
    targets, weights = rows.tokens[:, 1:].reshape(-1), rows.weights[:, 1:].reshape(-1)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1e-6)
