"""Attention over packed ragged tokens: within the batch (training), or over a paged cache (serving).

Dims: T packed tokens, H query heads, J key-value heads (H a multiple of J), K head dim, S sequences, P pages of the
pool, B tokens of a page, N pages of the longest sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tenfold.base.reach import Reach

QUERY_BLOCK, MOST_BLOCKS = 256, 8  # queries of a block, at least, and blocks of a row: later keys are masked for all
NEG_INF = -1e30  # finite, so that a row that is masked everywhere stays a number


@dataclass(frozen=True)
class AttentionSpec:
    """What one layer's attention does; static, and what tells layers apart.

    Attributes:
        scale: multiplies the scores.
        window, chunk: as in `Reach`.
        softcap: scores become softcap · tanh(scores / softcap).
        rope: which of the model's rotations the layer uses; None rotates nothing.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    rope: str | None = "default"
    chunk: int | None = None

    @property
    def reach(self) -> Reach:
        return Reach(self.window, self.chunk)


class Heads(NamedTuple):
    """What a layer gives attention.

    Attributes:
        q: queries, rotated.
        k, v: the keys and values of the same tokens; None where the layer reads those of another.
        sinks: of each query head, the score of a key that every query sees besides the tokens, and whose value is 0
            (gpt-oss); None has none.
    """

    q: Float[Array, "T H K"]
    k: Float[Array, "T J K"] | None
    v: Float[Array, "T J K"] | None
    sinks: Float[Array, " H"] | None = None


Attend = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(inputs, the layer's cache, spec) -> (outputs, the updated cache); `Heads` and AttentionSpec -> o_THK."""


def on_gpu() -> bool:
    """Whether what is traced now is for GPUs, unless it is told other devices."""
    return jax.default_backend() == "gpu"


def scores_mask(q_positions: Int[Array, "*q"], k_positions: Int[Array, "*k"], reach: Reach) -> jax.Array:
    """True where a query may see a key: not after it, and within reach. Broadcasts its arguments."""
    ahead = q_positions - k_positions
    seen = ahead >= 0
    if reach.window is not None:
        seen &= ahead < reach.window
    if reach.chunk is not None:
        seen &= q_positions // reach.chunk == k_positions // reach.chunk
    return seen


def packed_attention(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L J K"],
    v: Float[Array, "R L J K"],
    segments: Int[Array, "R L"],
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "R L H K"]:
    """Causal attention within each segment of each row: the reference, and what training uses.

    Args:
        q, k, v: R rows of L tokens.
        segments: an id per token; tokens see only tokens of the same id in the same row.
        spec: scale, reach and soft-cap.
        sinks: as in `Heads`.
    """
    L = q.shape[1]
    positions = jnp.arange(L)[None]
    if spec.chunk is not None:  # chunks are counted from where a segment starts
        positions = positions - segment_starts(segments)
    blocks: list[jax.Array] = []
    size = max(QUERY_BLOCK, -(-L // MOST_BLOCKS))
    for start in range(0, L, size):
        queries = slice(start, start + size)
        keys = slice(0 if spec.window is None else max(0, start - spec.window + 1), start + size)
        mask = scores_mask(positions[:, queries, None], positions[:, None, keys], spec.reach)
        mask = mask & (segments[:, queries, None] == segments[:, None, keys])
        blocks.append(masked_attention(q[:, queries], k[:, keys], v[:, keys], mask, spec, sinks))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def masked_attention(
    q: Float[Array, "R Q H K"],
    k: Float[Array, "R S J K"],
    v: Float[Array, "R S J K"],
    mask: Bool[Array, "R Q S"],
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "R Q H K"]:
    """Attention of each query to the keys that the mask names for it. Other arguments as of `packed_attention`."""
    (R, Q, H, K), J, G = q.shape, k.shape[2], q.shape[2] // k.shape[2]
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))  # products of whole matrices, once for each head
    scores = jnp.einsum("rjqk,rjsk->rjqs", q.reshape(R, J, G * Q, K), k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * spec.scale, spec.softcap).reshape(R, J, G, Q, -1)
    scores = jnp.where(mask[:, None, None], scores, NEG_INF)
    weights = softmax(scores, None if sinks is None else sinks.reshape(1, J, G, 1))
    out = jnp.einsum("rjqs,rjsk->rjqk", weights.astype(v.dtype).reshape(R, J, G * Q, -1), v)
    return jnp.moveaxis(out.reshape(R, H, Q, K), 1, 2)


def segment_starts(segments: Int[Array, "R L"]) -> Int[Array, "R L"]:
    """Where in its row the segment of each token starts."""
    fresh = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return jax.lax.cummax(jnp.where(fresh, jnp.arange(segments.shape[1])[None], 0), axis=1)


def softmax(scores: Float[Array, "*B S"], sinks: Float[Array, "*b"] | None) -> Float[Array, "*B S"]:
    """The weights of scores, of which `sinks`, that broadcast over the leading dims, take their share."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    column = jnp.broadcast_to(sinks.astype(scores.dtype), scores.shape[:-1])[..., None]
    return jax.nn.softmax(jnp.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]


def soft_cap(scores: jax.Array, cap: float | None) -> jax.Array:
    """Bounds scores smoothly to ±cap (Gemma 2); None leaves them."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)
