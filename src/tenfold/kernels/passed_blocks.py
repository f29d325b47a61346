"""The blocks that the rows of a step pass through: where recurrent layers read and leave their states.

A row computes tokens [begin, end) of its sequence. Within each block of it, cut at multiples of the page size from the
sequence's start, it starts from one state and ends with another. So whatever way a sequence was cut into steps, its
states are taken at the same places, and the page of a full block holds the state after its last token.

Dims: T packed tokens, S rows, N blocks of the longest sequence, M passed blocks at most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tenfold.kernels.paged_attention import RaggedBatch


class PassedBlocks(NamedTuple):
    """In the order of the rows, so that the first `num_decodes` are the rows with one token. Page 0 is the null page.

    Attributes:
        row: [M] whose block it is.
        first: [M] its first packed token.
        length: [M] its tokens in this step; 0 past the last block.
        source: [M] the page of the state before it: where the block before it has left it; 0 at a sequence's start.
        target: [M] where to leave the state after it: its own page, or that of the row's last block on the way there.
        page: [M] its own page, or 0 if it has none.
        num: how many there are.
    """

    row: Int[Array, " M"]
    first: Int[Array, " M"]
    length: Int[Array, " M"]
    source: Int[Array, " M"]
    target: Int[Array, " M"]
    page: Int[Array, " M"]
    num: Int[Array, ""]


def passed_blocks(batch: RaggedBatch, block_size: int, num_tokens: int, *, decode_only: bool = False) -> PassedBlocks:
    """Those of a step of `num_tokens` packed tokens, padding included; `decode_only`: every row has one token."""
    S = batch.kv_lens.shape[0]
    M = S if decode_only else num_tokens // block_size + 2 * S
    lengths = batch.query_starts[1:] - batch.query_starts[:-1]
    begin = batch.kv_lens - lengths
    first_block, last_block = begin // block_size, (batch.kv_lens - 1) // block_size
    ends = jnp.cumsum(jnp.where(lengths > 0, last_block - first_block + 1, 0))

    i = jnp.arange(M)
    row = jnp.minimum(jnp.searchsorted(ends, i, side="right"), S - 1)
    block = last_block[row] + 1 + i - ends[row]
    start = jnp.maximum(block * block_size, begin[row])
    stop = jnp.minimum((block + 1) * block_size, batch.kv_lens[row])
    used = i < ends[-1]

    def page_of(block: jax.Array) -> jax.Array:
        return jnp.where(used, batch.block_tables[row, jnp.maximum(block, 0)], 0)

    last, own, before = page_of(last_block[row]), page_of(block), page_of(block - 1)
    carried = jnp.where(before > 0, before, last)
    resumed = jnp.where(begin[row] > 0, page_of((begin[row] - 1) // block_size), 0)
    return PassedBlocks(
        row=row,
        first=jnp.where(used, batch.query_starts[row] + start - begin[row], 0),
        length=jnp.where(used, stop - start, 0),
        source=jnp.where(block > first_block[row], carried, resumed),
        target=jnp.where(own > 0, own, last),
        page=own,
        num=ends[-1],
    )


def states_before(states: jax.Array, source: Int[Array, " M"]) -> jax.Array:
    """The states of these pages [P, ...]; zero where a sequence starts."""
    held = states.at[source].get(mode="promise_in_bounds")
    return jnp.where((source > 0).reshape(-1, *(1,) * (states.ndim - 1)), held, 0)
