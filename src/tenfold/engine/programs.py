"""The device programs of the engine: pure functions, compiled once per bucket.

Dims: T packed tokens, P of the largest step, S rows (sequences of the step), D model width, V vocabulary, N blocks of
the longest sequence, R rows of the token history (one per slot, and one for padding), X its length.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
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


class StepKind(NamedTuple):
    """What is compiled into a step's program.

    Attributes:
        reaches: of the layer groups.
        block_size: tokens of a page.
        decode_only: every row has one token.
        padded_to: P: so many hidden states are returned at least, since one program for P scores prompts of every T.
    """

    reaches: tuple[Reach, ...]
    block_size: int
    decode_only: bool
    padded_to: int


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
    kind: StepKind,
) -> tuple[list[Any], Float[Array, "P D"], Float[Array, "S D"]]:
    """Computes a step: writes the caches, which are meant to be donated.

    Returns: the caches, all hidden states, and those of each row's last token.
    """
    block_size, decode_only = kind.block_size, kind.decode_only

    def attend(inputs: Any, cache: Any, spec: Any) -> tuple[jax.Array, Any]:
        group = kind.reaches.index(spec.reach)
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
    padding = max(0, kind.padded_to - hidden.shape[0])
    return updated, jnp.pad(hidden, ((0, padding), (0, 0))), hidden[batch.last]


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
    return lax.dynamic_update_slice_in_dim(history, tokens[None], slot, 0)


class PromptLogprobs(NamedTuple):
    """Log-probabilities of each packed token's successor in its prompt; `top` are the most likely instead."""

    logprob: Float[Array, " P"]
    rank: Int[Array, " P"]
    top_ids: Int[Array, "P k"]
    top_logprobs: Float[Array, "P k"]


def prompt_logprobs(
    params: Tree,
    history: Int[Array, "R X"],
    hidden: Float[Array, "P D"],
    slots: Int[Array, " P"],
    positions: Int[Array, " P"],
    count: Int[Array, ""],
    *,
    model: Model,
    k: int,
) -> PromptLogprobs:
    """Scores the tokens after the first `count` positions, a few at a time: P · V logits would not fit, nor be needed.

    What stands beyond, up to a multiple of a few, means nothing.
    """
    P = hidden.shape[0]
    rows = min(P, PROMPT_ROWS)
    following = history[slots, jnp.minimum(positions + 1, history.shape[1] - 1)]
    pad = -P % rows
    hidden, targets = jnp.pad(hidden, ((0, pad), (0, 0))), jnp.pad(following, (0, pad))

    def score(part: Int[Array, ""], scored: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        of_part = [lax.dynamic_slice_in_dim(x, part * rows, rows) for x in (hidden, targets)]
        found = sampling.logprobs(model.logits(params, of_part[0]), of_part[1], k=k)
        pairs = zip(scored, found, strict=True)
        return tuple(lax.dynamic_update_slice_in_dim(whole, new, part * rows, 0) for whole, new in pairs)

    shapes = ((), jnp.float32), ((), jnp.int32), ((k,), jnp.int32), ((k,), jnp.float32)
    empty = tuple(jnp.zeros((P + pad, *shape), dtype) for shape, dtype in shapes)
    return PromptLogprobs(*lax.fori_loop(0, (count + rows - 1) // rows, score, empty))
