"""The loss of next-token prediction over packed rows."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tenfold.kernels.attention import AttentionSpec, packed_attention
from tenfold.models.family import Model
from tenfold.nn.param import Tree
from tenfold.train.packing import Rows


def hidden_states(params: Tree, model: Model, rows: Rows) -> Float[Array, "N L D"]:
    """Hidden states of packed rows; attention is causal and stays within each segment."""
    N, L = rows.tokens.shape

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, cache: None, spec: AttentionSpec) -> tuple[jax.Array, None]:
        q, k, v = (x.reshape(N, L, *x.shape[1:]) for x in (q, k, v))
        o = packed_attention(q, k, v, jnp.asarray(rows.segment_ids), spec)
        return o.reshape(N * L, *o.shape[2:]), cache

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
