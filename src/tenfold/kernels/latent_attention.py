"""Multi-head latent attention (DeepSeek-AI, 2024) over a paged cache of latents, in the absorbed form.

Every head's keys and values are linear maps of one latent of the token, besides a rotated key that all heads share. So
queries are mapped to where the latents are, once, and attention is that of H queries to one key, whose first values are
the value too. The cache holds the latent and the shared key of a token, and nothing for its heads.

Dims: T packed tokens, S sequences, H query heads, R latent dim, K rotated dim, W = R + K, P pages, B tokens of a page,
N pages of the longest sequence, L tokens of a row.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.base.reach import FULL, Reach
from tenfold.kernels.attention import NEG_INF, scores_mask
from tenfold.kernels.paged_attention import CHUNK_TOKENS, RaggedBatch, attend_rows


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
        q: queries, mapped to the latents.
        q_rotated: their rotated part.
        latent: of each token.
        k_rotated: the rotated key of each token.
    """

    q: Float[Array, "T H R"]
    q_rotated: Float[Array, "T H K"]
    latent: Float[Array, "T R"]
    k_rotated: Float[Array, "T K"]


LatentCache = Float[Array, "P B W"]  # latents and rotated keys; page 0 is the null page


def write(cache: LatentCache, inputs: Latents, pages: Int[Array, " T"], offsets: Int[Array, " T"]) -> LatentCache:
    """Stores each token's latent and rotated key at (page, offset); in place when the cache is donated.

    They are made finite: a page that is given to another sequence is read before it is full, and its old values are
    multiplied by 0, which must give 0.
    """
    entries = jnp.concatenate([inputs.latent, inputs.k_rotated], axis=-1).astype(cache.dtype)
    return cache.at[pages, offsets].set(jnp.nan_to_num(entries), mode="promise_in_bounds")


def reference(inputs: Latents, segments: Int[Array, "rows L"], spec: LatentSpec) -> Float[Array, "T H R"]:
    """The definition, causal and within each segment of each row (T = rows · L): what training uses."""
    rows, length = segments.shape
    q, q_rotated, latent, k_rotated = (x.reshape(rows, length, *x.shape[1:]) for x in inputs)
    scores = jnp.einsum("rqhk,rsk->rhqs", q, latent, preferred_element_type=jnp.float32)
    scores += jnp.einsum("rqhk,rsk->rhqs", q_rotated, k_rotated, preferred_element_type=jnp.float32)
    positions = jnp.arange(length)
    mask = scores_mask(positions[:, None], positions[None, :], spec.reach)[None]
    mask &= segments[:, :, None] == segments[:, None, :]
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores * spec.scale, NEG_INF), axis=-1)
    o = jnp.einsum("rhqs,rsk->rqhk", weights.astype(latent.dtype), latent)
    return o.reshape(rows * length, *o.shape[2:])


def paged_latent_attention(
    inputs: Latents, cache: LatentCache, batch: RaggedBatch, spec: LatentSpec, *, decode_only: bool = False
) -> Float[Array, "T H R"]:
    """Causal attention of each row's query tokens, its last ones, to the latents in its pages.

    Args:
        inputs: of the packed tokens; row r owns tokens [query_starts[r], query_starts[r + 1]).
        cache: holds the latents of this step's tokens too.
        batch: the rows.
        spec: the scale.
        decode_only: every row has one query token; compiles no code for others.

    Returns:
        The latents that each head read; tokens past the last row hold no meaning.
    """
    pages = max(1, CHUNK_TOKENS // cache.shape[1])
    q = jnp.concatenate([inputs.q, inputs.q_rotated], axis=-1)
    attend = partial(_attend, cache=cache, values=inputs.q.shape[-1], scale=spec.scale, pages=pages)
    return attend_rows(attend, q, inputs.q.shape[-1], batch, pages, decode_only=decode_only)


@partial(jax.jit, static_argnames=("values", "scale", "pages"))  # traced once for all the layers that call it alike
def _attend(
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
