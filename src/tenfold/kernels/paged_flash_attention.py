"""Attention over a paged cache on a GPU, page by page, in Pallas for Triton: what `paged_attention` computes in XLA.

Queries of one sequence that share a key-value head are the rows of one tile. A sequence's keys are cut into spans that
programs read at the same time, as in Flash-Decoding (Dao et al., 2023), and what they read is joined by its weights. So
one long sequence keeps the whole card busy, too.

Dims: R sequences or blocks of one, Q queries of each, H query heads, J key-value heads, G = H / J, K head dim, P pages,
B tokens of a page, N pages of the longest sequence, M = Q · G rows of a tile or more, X spans.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Float32, Int

from tenfold.kernels.attention import NEG_INF, AttentionSpec, scores_mask
from tenfold.kernels.flash_attention import LOG2_E, SMALLEST_DIM

MOST_ROWS = 128  # of a tile
MOST_SPANS = 32
SHORTEST_SPAN = 256  # tokens


def has_tiles(page_size: int, head_dim: int) -> bool:
    """Whether pages are tiles that Triton has products of."""
    return all(size >= SMALLEST_DIM and size & (size - 1) == 0 for size in (page_size, head_dim))


def query_block(H: int, J: int) -> int:
    """Queries of a sequence that share a tile."""
    return max(1, MOST_ROWS // pl.next_power_of_2(H // J))


def attend_pages(
    q: Float[Array, "R Q H K"],
    cache: tuple[Array, Array, Array | None, Array | None],
    tables: Int[Array, "R N"],
    positions: Int[Array, "R Q"],
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "R Q H K"]:
    """Attends with Q queries of each of R sequences; position -1 is padding.

    Args:
        q: queries.
        cache: a `PagedCache`.
        tables: the pages of each sequence.
        positions: of the queries.
        spec, sinks: as of `paged_attention`.
        interpret: run the kernel where there is no GPU, slowly, to test it.
    """
    k, v, *scales = cache
    (R, Q, H, K), (J, B), N = q.shape, (k.shape[1], k.shape[3]), tables.shape[1]
    G = H // J
    rows = max(SMALLEST_DIM, pl.next_power_of_2(Q * G))
    pad = rows - Q * G
    tiles = jnp.pad(q.reshape(R, Q, J, G, K).swapaxes(1, 2).reshape(R, J, Q * G, K), ((0, 0), (0, 0), (0, pad), (0, 0)))
    of_rows = jnp.pad(jnp.repeat(positions, G, axis=1), ((0, 0), (0, pad)), constant_values=-1).astype(jnp.int32)
    span = B * max(-(-SHORTEST_SPAN // B), -(-N // MOST_SPANS)) if Q == 1 else B * N
    X = -(-B * N // span)
    bounds = jnp.stack([_first_key(positions, spec), positions.max(1) + 1], axis=1).astype(jnp.int32)
    per_head = pl.BlockSpec((k.shape[0], None, B), lambda x, j, r: (0, j, 0))
    o, lse = pl.pallas_call(
        partial(_kernel, spec=spec, span=span, scaled=scales[0] is not None),
        [jax.ShapeDtypeStruct((X, R, J, rows, K), jnp.float32), jax.ShapeDtypeStruct((X, R, J, rows), jnp.float32)],
        grid=(X, J, R),
        in_specs=[
            pl.BlockSpec((None, 2), lambda x, j, r: (r, 0)),
            pl.BlockSpec((None, N), lambda x, j, r: (r, 0)),
            pl.BlockSpec((None, rows), lambda x, j, r: (r, 0)),
            pl.BlockSpec((None, None, rows, K), lambda x, j, r: (r, j, 0, 0)),
            pl.BlockSpec((k.shape[0], None, K, B), lambda x, j, r: (0, j, 0, 0)),
            pl.BlockSpec((k.shape[0], None, B, K), lambda x, j, r: (0, j, 0, 0)),
            *(per_head for x in scales if x is not None),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, rows, K), lambda x, j, r: (x, r, j, 0, 0)),
            pl.BlockSpec((None, None, None, rows), lambda x, j, r: (x, r, j, 0)),
        ],
        compiler_params=plt.CompilerParams(num_warps=4 if rows < MOST_ROWS else 8, num_stages=3),
        interpret=interpret,
        name="attend_pages",
    )(bounds, tables, of_rows, tiles, k, v, *(x for x in scales if x is not None))
    joined = _join(o[:, :, :, : Q * G], lse[:, :, :, : Q * G].reshape(X, R, J, Q, G), sinks)
    return joined.reshape(R, J, Q, G, K).swapaxes(1, 2).reshape(R, Q, H, K).astype(q.dtype)


def _first_key(positions: Int[Array, "R Q"], spec: AttentionSpec) -> Int[Array, " R"]:
    """The earliest key that a query of each sequence sees."""
    earliest = jnp.where(positions < 0, 2**30, positions).min(1)
    first = jnp.zeros_like(earliest)
    if spec.window is not None:
        first = jnp.maximum(first, earliest - spec.window + 1)
    if spec.chunk is not None:
        first = jnp.maximum(first, earliest // spec.chunk * spec.chunk)
    return first


def _join(
    o: Float32[Array, "X R J M K"], lse: Float32[Array, "X R J Q G"], sinks: Float[Array, " H"] | None
) -> Float32[Array, "R J M K"]:
    """What the spans read, by the sum of their weights, and of the sinks'."""
    X, R, J, Q, G = lse.shape
    if sinks is None:
        peak, total = lse.max(0, keepdims=True), jnp.zeros((1, R, J, Q, G), jnp.float32)
    else:
        at_sinks = sinks.astype(jnp.float32).reshape(1, 1, J, 1, G) * LOG2_E
        peak = jnp.maximum(lse.max(0, keepdims=True), at_sinks)
        total = jnp.exp2(at_sinks - peak)
    weights = jnp.where(lse > NEG_INF, jnp.exp2(lse - peak), 0)
    weights = weights / jnp.maximum(total + weights.sum(0, keepdims=True), 1e-30)
    weights = weights.reshape(X, R, J, Q * G, 1)
    return jnp.where(weights > 0, o * weights, 0).sum(0)  # a span that nothing is read of holds anything


def _kernel(*refs: Any, spec: AttentionSpec, span: int, scaled: bool) -> None:
    bounds_ref, table_ref, positions_ref, q_ref, k_ref, v_ref, *scales, o_ref, lse_ref = refs
    B = k_ref.shape[2]
    start = pl.program_id(0) * span
    begin = jnp.maximum(bounds_ref[0], start)
    end = jnp.minimum(bounds_ref[1], start + span)

    @pl.when(begin < end)
    def read() -> None:
        positions = positions_ref[...]
        q = q_ref[...]

        def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            peak, total, values = carry
            page = table_ref[i]
            k, v = k_ref[page], v_ref[page]
            if scaled:
                k = (k.astype(jnp.float32) * scales[0][page][None, :]).astype(q.dtype)
                v = (v.astype(jnp.float32) * scales[1][page][:, None]).astype(q.dtype)
            s = plt.dot(q, k, allow_tf32=False) * spec.scale
            if spec.softcap is not None:
                s = jnp.tanh(s / spec.softcap) * spec.softcap
            keys = i * B + jnp.arange(B)
            seen = scores_mask(positions[:, None], keys[None, :], spec.reach)
            s = jnp.where(seen, s * LOG2_E, NEG_INF)
            new_peak = jnp.maximum(peak, s.max(1))
            p = jnp.where(seen, jnp.exp2(s - new_peak[:, None]), 0)
            rescale = jnp.exp2(peak - new_peak)
            values = values * rescale[:, None] + plt.dot(p.astype(v.dtype), v, allow_tf32=False)
            return new_peak, total * rescale + p.sum(1), values

        M = q.shape[0]
        carry = jnp.full(M, NEG_INF, jnp.float32), jnp.zeros(M, jnp.float32), jnp.zeros(q.shape, jnp.float32)
        peak, total, values = jax.lax.fori_loop(begin // B, (end + B - 1) // B, step, carry)
        o_ref[...] = values / jnp.maximum(total, 1e-30)[:, None]
        lse_ref[...] = jnp.where(total > 0, peak + jnp.log2(jnp.maximum(total, 1e-30)), NEG_INF)

    @pl.when(begin >= end)
    def skip() -> None:
        lse_ref[...] = jnp.full(lse_ref.shape, NEG_INF, jnp.float32)
