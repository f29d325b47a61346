"""The device programs of the engine: pure functions, compiled once per bucket.

Dims: T packed tokens, S rows (sequences of the step), D model width, V vocabulary, N blocks of the longest sequence,
R rows of the token history (one per slot, and one for padding), X its length.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.base.reach import Reach
from tenfold.kernels import latent_attention, sampling
from tenfold.kernels.attention import AttentionSpec, Heads
from tenfold.kernels.convolution import ConvolutionSpec, short_convolution
from tenfold.kernels.latent_attention import LatentSpec, paged_latent_attention
from tenfold.kernels.paged_attention import Cache, NativeCache, RaggedBatch, paged_attention, read, update, write
from tenfold.kernels.recurrence import RecurrenceSpec, paged_recurrence
from tenfold.kernels.sampling import SamplingBatch
from tenfold.models.family import Model
from tenfold.nn.param import Tree

PROMPT_ROWS = 32  # prompt positions whose logits exist at a time


class StepBatch(NamedTuple):
    """One step's tokens and rows. What differs by layer group is a tuple with one entry per group.

    Attributes:
        slots, positions: [T] where each token stands in the history; padding points at the last row.
        pages, offsets: per group [T], offsets [T]: where its key and value go; padding goes to the null page.
        block_tables: per group [S, N].
        kv_lens, query_starts, num_decodes, num_seqs: as in `RaggedBatch`.
        last: [S] packed index of each row's last token.
    """

    slots: Any
    positions: Any
    pages: tuple[Any, ...]
    offsets: Any
    block_tables: tuple[Any, ...]
    kv_lens: Any
    query_starts: Any
    num_decodes: Any
    num_seqs: Any
    last: Any


def forward(
    params: Tree,
    caches: Sequence[Any],
    history: Int[Array, "R X"],
    batch: StepBatch,
    *,
    model: Model,
    reaches: tuple[Reach, ...],
    block_size: int,
    decode_only: bool,
) -> tuple[list[Any], Float[Array, "T D"], Float[Array, "S D"]]:
    """Computes a step: writes the caches, and returns all hidden states and those of each row's last token.

    `reaches` are those of the layer groups; `decode_only`: every row has one token. The caches are meant to be donated.
    """

    def attend(inputs: Any, cache: Any, spec: Any) -> tuple[jax.Array, Any]:
        group = reaches.index(spec.reach)
        ragged = RaggedBatch(
            batch.block_tables[group], batch.kv_lens, batch.query_starts, batch.num_decodes, batch.num_seqs
        )
        match spec:
            case ConvolutionSpec():
                return short_convolution(inputs, cache, ragged, block_size, decode_only=decode_only)
            case LatentSpec():
                cache = latent_attention.write(cache, inputs, batch.pages[group], batch.offsets)
                return paged_latent_attention(inputs, cache, ragged, spec, decode_only=decode_only), cache
            case RecurrenceSpec():
                return paged_recurrence(inputs, cache, ragged, block_size, decode_only=decode_only)
            case _:
                return attend_heads(inputs, cache, spec, ragged, batch.pages[group])

    def attend_heads(
        heads: Heads, cache: Cache, spec: AttentionSpec, ragged: RaggedBatch, pages: jax.Array
    ) -> tuple[jax.Array, Cache]:
        q, k, v, sinks = heads
        if k is None or v is None:  # this step's are in the cache already, which is another layer's
            if isinstance(cache, NativeCache):
                return read(q, cache, ragged, spec, sinks), cache
            return paged_attention(q, cache, ragged, spec, sinks, decode_only=decode_only), cache
        if isinstance(cache, NativeCache):
            return update(q, k, v, cache, ragged, spec, sinks)
        cache = write(cache, k, v, pages, batch.offsets)
        return paged_attention(q, cache, ragged, spec, sinks, decode_only=decode_only), cache

    tokens = history[batch.slots, batch.positions]
    hidden, updated = model.forward(params, tokens, batch.positions, attend, caches)
    return updated, hidden, hidden[batch.last]


def sample(
    params: Tree,
    history: Int[Array, "R X"],
    hidden: Float[Array, "S D"],
    batch: SamplingBatch,
    *,
    model: Model,
) -> tuple[Int[Array, "R X"], Int[Array, " S"], Float[Array, "S V"]]:
    """Samples a token per row and writes it into the history, which is meant to be donated. Also returns the logits."""
    logits = model.logits(params, hidden)
    tokens = sampling.sample(logits, batch, history)
    history = history.at[batch.slot, batch.position].set(tokens, mode="promise_in_bounds")
    return history, tokens, logits


def admit(history: Int[Array, "R X"], slot: Int[Array, ""], tokens: Int[Array, " X"]) -> Int[Array, "R X"]:
    """Writes the tokens that the host knows of a sequence into its row. The history is meant to be donated."""
    return jax.lax.dynamic_update_slice_in_dim(history, tokens[None], slot, 0)


class PromptLogprobs(NamedTuple):
    """Log-probabilities of each packed token's successor in its prompt; `top` are the most likely instead."""

    logprob: Float[Array, " T"]
    rank: Int[Array, " T"]
    top_ids: Int[Array, "T k"]
    top_logprobs: Float[Array, "T k"]


def prompt_logprobs(
    params: Tree,
    history: Int[Array, "R X"],
    hidden: Float[Array, "T D"],
    slots: Int[Array, " T"],
    positions: Int[Array, " T"],
    *,
    model: Model,
    k: int,
) -> PromptLogprobs:
    """Scores the token after each position of a step, a few positions at a time: T · V logits would not fit."""
    T = hidden.shape[0]
    rows = min(T, PROMPT_ROWS)
    following = history[slots, jnp.minimum(positions + 1, history.shape[1] - 1)]
    pad = -T % rows
    hidden = jnp.pad(hidden, ((0, pad), (0, 0))).reshape(-1, rows, hidden.shape[1])
    targets = jnp.pad(following, (0, pad)).reshape(-1, rows)
    scored = jax.lax.map(lambda part: sampling.logprobs(model.logits(params, part[0]), part[1], k=k), (hidden, targets))
    return PromptLogprobs(*(x.reshape(-1, *x.shape[2:])[:T] for x in scored))
