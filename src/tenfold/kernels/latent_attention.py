"""Multi-head latent attention (DeepSeek-AI, 2024) over a paged cache of latents.

Every head's keys and values are linear maps of one latent of the token, besides a rotated key that all heads share. The
cache holds the latent and the shared key of a token, and nothing for its heads. There are two ways to the same sums,
with these multiplications for each head:

- absorbed: queries are mapped to where the latents are, R·K for each, and what they read to values, R·V; a pair of a
  query and a key takes 2·R + Kr.
- expanded: keys and values are made of each latent, R·(K + V); a pair takes K + Kr + V.

A decoding sequence has one query for all its keys: absorbed. Of a prompt, Q queries that see S keys are expanded where
that is less: where R·(K + V)·(S - Q) < Q·S·(2·R - K - V). For DeepSeek's sizes (512, 128, 64 and 128) that is from 171
queries on, however many keys there are, and for a whole prompt of any length. Of 512 queries on many keys, a pair then
takes 576 instead of 1088.

Dims: T packed tokens, S sequences, H query heads, R latent dim, K head dim without rotation, Kr rotated dim, V value
dim, W = R + Kr, P pages, B tokens of a page, N pages of the longest sequence, L tokens of a row.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tenfold.base.reach import FULL, Reach
from tenfold.kernels.attention import NEG_INF, scores_mask
from tenfold.kernels.paged_attention import (
    CHUNK_TOKENS,
    QUERY_BLOCK,
    RaggedBatch,
    attend_decodes,
    attend_prefills,
    pad_tables,
)

SHARED_BLOCKS = 8  # blocks of a prompt's queries that share the keys and values that latents expand to


@dataclass(frozen=True)
class LatentSpec:
    """What one layer's latent attention does; static. `scale` multiplies the scores."""

    scale: float

    @property
    def reach(self) -> Reach:
        return FULL


class Latents(NamedTuple):
    """What a layer gives latent attention.

    Attributes:
        q: queries, without their rotated part.
        q_rotated: that part.
        latent: of each token.
        k_rotated: the rotated key of each token.
        to_keys, to_values: map latents to each head's keys, without their rotated part, and values.
    """

    q: Float[Array, "T H K"]
    q_rotated: Float[Array, "T H Kr"]
    latent: Float[Array, "T R"]
    k_rotated: Float[Array, "T Kr"]
    to_keys: Float[Array, "H K R"]
    to_values: Float[Array, "H V R"]


LatentCache = Float[Array, "P B W"]  # latents and rotated keys; page 0 is the null page


def write(cache: LatentCache, inputs: Latents, pages: Int[Array, " T"], offsets: Int[Array, " T"]) -> LatentCache:
    """Stores each token's latent and rotated key at (page, offset); in place when the cache is donated.

    They are made finite: a page that is given to another sequence is read before it is full, and its old values are
    multiplied by 0, which must give 0.
    """
    entries = jnp.concatenate([inputs.latent, inputs.k_rotated], axis=-1).astype(cache.dtype)
    return cache.at[pages, offsets].set(jnp.nan_to_num(entries), mode="promise_in_bounds")


def reference(inputs: Latents, segments: Int[Array, "rows L"], spec: LatentSpec) -> Float[Array, "T H V"]:
    """The definition, causal and within each segment of each row (T = rows · L): what training uses."""
    rows, length = segments.shape
    q, q_rotated, latent, k_rotated = (x.reshape(rows, length, *x.shape[1:]) for x in inputs[:4])
    k = jnp.einsum("rsl,hkl->rshk", latent, inputs.to_keys)
    v = jnp.einsum("rsl,hvl->rshv", latent, inputs.to_values)
    scores = jnp.einsum("rqhk,rshk->rhqs", q, k, preferred_element_type=jnp.float32)
    scores += jnp.einsum("rqhk,rsk->rhqs", q_rotated, k_rotated, preferred_element_type=jnp.float32)
    positions = jnp.arange(length)
    mask = scores_mask(positions[:, None], positions[None, :], spec.reach)[None]
    mask &= segments[:, :, None] == segments[:, None, :]
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores * spec.scale, NEG_INF), axis=-1)
    o = jnp.einsum("rhqs,rshv->rqhv", weights.astype(v.dtype), v)
    return o.reshape(rows * length, *o.shape[2:])


def paged_latent_attention(
    inputs: Latents, cache: LatentCache, batch: RaggedBatch, spec: LatentSpec, *, decode_only: bool = False
) -> Float[Array, "T H V"]:
    """Causal attention of each row's query tokens, its last ones, to the latents in its pages.

    Args:
        inputs: of the packed tokens; row r owns tokens [query_starts[r], query_starts[r + 1]).
        cache: holds the latents of this step's tokens too.
        batch: the rows.
        spec: the scale.
        decode_only: every row has one query token; compiles no code for others.

    Returns:
        What each head reads; tokens past the last row hold no meaning.
    """
    T, R = inputs.q.shape[0], inputs.latent.shape[1]
    pages = max(1, CHUNK_TOKENS // cache.shape[1])
    batch = pad_tables(batch, pages)
    maps = inputs.to_keys, inputs.to_values
    q = jnp.concatenate([inputs.q, inputs.q_rotated], axis=-1)
    attend = partial(_attend_latents, cache=cache, values=R, scale=spec.scale, pages=pages)
    decodes = min(T, batch.kv_lens.shape[0])  # at most
    read = attend_decodes(attend, _absorb(q[:decodes], inputs.to_keys), R, batch)
    out = jnp.pad(_to_values(read, inputs.to_values), ((0, T - decodes), (0, 0), (0, 0)))
    if decode_only:
        return out
    attend = partial(_attend_block, cache=cache, maps=maps, scale=spec.scale, pages=pages)
    size = min(SHARED_BLOCKS, -(-T // QUERY_BLOCK)) * QUERY_BLOCK
    return attend_prefills(attend, q, out, batch, size)


def _absorb(q: Float[Array, "n H Kall"], to_keys: Float[Array, "H K R"]) -> Float[Array, "n H W"]:
    """Queries, mapped to where the latents are."""
    q, rotated = jnp.split(q, (to_keys.shape[1],), axis=-1)
    return jnp.concatenate([jnp.einsum("nhk,hkr->nhr", q, to_keys), rotated], axis=-1)


def _to_values(read: Float[Array, "n H R"], to_values: Float[Array, "H V R"]) -> Float[Array, "n H V"]:
    """What heads read, mapped from where the latents are."""
    return jnp.einsum("nhr,hvr->nhv", read.astype(to_values.dtype), to_values)


@partial(jax.jit, static_argnames=("scale", "pages"))  # traced once for all the layers that call it alike
def _attend_block(
    q: Float[Array, "1 Q H Kall"],
    cache: LatentCache,
    maps: tuple[Float[Array, "H K R"], Float[Array, "H V R"]],
    tables: Int[Array, "1 N"],
    positions: Int[Array, "1 Q"],
    scale: float,
    pages: int,
) -> Float[Array, "1 Q H V"]:
    """A block of one sequence's queries, in the cheaper of the two ways; position -1 is padding, which comes last."""
    to_keys, to_values = maps
    (H, K, R), V = to_keys.shape, to_values.shape[1]
    num_queries, num_keys = (positions >= 0).sum(), positions.max() + 1
    used = (num_queries + QUERY_BLOCK - 1) // QUERY_BLOCK
    blocks, places = q.reshape(-1, QUERY_BLOCK, *q.shape[2:]), positions.reshape(-1, QUERY_BLOCK)

    def expanded() -> jax.Array:
        return _attend_expanded(blocks, places, used, cache, maps, tables[0], scale, pages)

    def absorbed() -> jax.Array:
        def block(g: jax.Array, out: jax.Array) -> jax.Array:
            q = _absorb(blocks[g], to_keys)[None]
            read = _attend_latents(q, cache, tables, places[g][None], R, scale, pages)
            return out.at[g].set(_to_values(read[0], to_values).astype(out.dtype))

        return jax.lax.fori_loop(0, used, block, jnp.zeros((*blocks.shape[:3], V), jnp.float32))

    return jax.lax.cond(expands(num_queries, num_keys, K, R, V), expanded, absorbed).reshape(1, -1, H, V)


def expands(num_queries: Int[Array, ""], num_keys: Int[Array, ""], K: int, R: int, V: int) -> Bool[Array, ""]:
    """Whether expanding the latents of `num_keys` tokens takes fewer multiplications, as the module counts them."""
    queries, keys = num_queries.astype(jnp.float32), num_keys.astype(jnp.float32)
    return R * (K + V) * (keys - queries) < queries * keys * (2 * R - K - V)


def _attend_expanded(
    q: Float[Array, "G Q H Kall"],
    positions: Int[Array, "G Q"],
    used: Int[Array, ""],
    cache: LatentCache,
    maps: tuple[Float[Array, "H K R"], Float[Array, "H V R"]],
    table: Int[Array, " N"],
    scale: float,
    pages: int,
) -> Float[Array, "G Q H V"]:
    """Online softmax of the first `used` blocks of one sequence's queries, over the keys and values of `pages` pages at
    a time, which they share."""
    to_keys, to_values = maps
    (G, Q, H, _), R, chunk = q.shape, to_keys.shape[2], pages * cache.shape[1]
    q = (q * jnp.asarray(scale, q.dtype)).swapaxes(1, 2)
    last = jnp.where(positions < 0, 2**30, positions).max(-1)

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        chosen = jax.lax.dynamic_slice_in_dim(table, i * pages, pages)
        keys = i * chunk + jnp.arange(chunk)
        entries = cache.at[chosen].get(mode="promise_in_bounds").reshape(chunk, -1)
        # What is past the sequence is finite, but what it expands to need not be, and is multiplied by 0.
        latent, rotated = jnp.split(jnp.where((keys <= positions.max())[:, None], entries, 0), (R,), axis=1)
        k = jnp.einsum("cr,hkr->hck", latent, to_keys)
        k = jnp.concatenate([k, jnp.broadcast_to(rotated, (H, *rotated.shape))], axis=-1)
        v = jnp.einsum("cr,hvr->hcv", latent, to_values)

        def block(g: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            peak, total, acc = (x[g] for x in carry)
            scores = jnp.einsum("hqk,hck->hqc", q[g], k, preferred_element_type=jnp.float32)
            scores = jnp.where(scores_mask(positions[g][:, None], keys[None], FULL)[None], scores, NEG_INF)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.where(scores <= NEG_INF, 0, jnp.exp(scores - new_peak[..., None]))
            rescale = jnp.exp(peak - new_peak)
            read = jnp.einsum("hqc,hcv->hqv", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            new = new_peak, total * rescale + weights.sum(-1), acc * rescale[..., None] + read
            return tuple(x.at[g].set(part) for x, part in zip(carry, new, strict=True))

        first = jnp.searchsorted(last, i * chunk)  # the first block that sees any of these keys
        return jax.lax.fori_loop(first, used, block, carry)

    carry = (
        jnp.full((G, H, Q), NEG_INF, jnp.float32),
        jnp.zeros((G, H, Q), jnp.float32),
        jnp.zeros((G, H, Q, to_values.shape[1]), jnp.float32),
    )
    _, total, acc = jax.lax.fori_loop(0, positions.max() // chunk + 1, step, carry)
    return (acc / jnp.maximum(total, 1e-30)[..., None]).swapaxes(1, 2)


@partial(jax.jit, static_argnames=("values", "scale", "pages"))
def _attend_latents(
    q: Float[Array, "S Q H W"],
    cache: LatentCache,
    tables: Int[Array, "S N"],
    positions: Int[Array, "S Q"],
    values: int,
    scale: float,
    pages: int,
) -> Float[Array, "S Q H R"]:
    """Online softmax of some sequences with Q queries each, `pages` pages at a time; position -1 is padding."""
    S, Q, H, W = q.shape
    chunk = pages * cache.shape[1]
    q = (q * jnp.asarray(scale, q.dtype)).reshape(S, Q * H, W)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        peak, total, acc = carry
        chosen = jax.lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)
        entries = cache.at[chosen].get(mode="promise_in_bounds").reshape(S, chunk, W)
        scores = jnp.einsum("smw,scw->smc", q, entries, preferred_element_type=jnp.float32)
        keys = i * chunk + jnp.arange(chunk)
        mask = scores_mask(positions[:, :, None], keys[None, None, :], FULL)
        scores = jnp.where(jnp.repeat(mask, H, axis=1), scores, NEG_INF)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.where(scores <= NEG_INF, 0, jnp.exp(scores - new_peak[..., None]))
        rescale = jnp.exp(peak - new_peak)
        total = total * rescale + weights.sum(-1)
        read = jnp.einsum(
            "smc,scr->smr", weights.astype(entries.dtype), entries[..., :values], preferred_element_type=jnp.float32
        )
        return new_peak, total, acc * rescale[..., None] + read

    carry = (
        jnp.full((S, Q * H), NEG_INF, jnp.float32),
        jnp.zeros((S, Q * H), jnp.float32),
        jnp.zeros((S, Q * H, values), jnp.float32),
    )
    _, total, acc = jax.lax.fori_loop(0, positions.max() // chunk + 1, step, carry)
    return (acc / jnp.maximum(total, 1e-30)[..., None]).reshape(S, Q, H, values)
