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
    M = pl.next_power_of_2(Q * G)
    at_sinks = None if sinks is None else _sinks_of_rows(sinks, J, Q, M)
    if X == 1:
        joined = _weigh(o[0, :, :, :M], lse[0, :, :, :M], at_sinks).astype(q.dtype)
    else:
        joined = _join_spans(o, lse, at_sinks, M, q.dtype, interpret=interpret)
    return joined[:, :, : Q * G].reshape(R, J, Q, G, K).swapaxes(1, 2).reshape(R, Q, H, K)


def _first_key(positions: Int[Array, "R Q"], spec: AttentionSpec) -> Int[Array, " R"]:
    """The earliest key that a query of each sequence sees."""
    earliest = jnp.where(positions < 0, 2**30, positions).min(1)
    first = jnp.zeros_like(earliest)
    if spec.window is not None:
        first = jnp.maximum(first, earliest - spec.window + 1)
    if spec.chunk is not None:
        first = jnp.maximum(first, earliest // spec.chunk * spec.chunk)
    return first


def _sinks_of_rows(sinks: Float[Array, " H"], J: int, Q: int, M: int) -> Float32[Array, "J M"]:
    """The sink of every row of a tile, in units of log 2."""
    rows = jnp.tile(sinks.astype(jnp.float32).reshape(J, -1) * LOG2_E, (1, Q))
    return jnp.pad(rows, ((0, 0), (0, M - rows.shape[1])))


def _weigh(
    o: Float32[Array, "R J M K"], lse: Float32[Array, "R J M"], at_sinks: Float32[Array, "J M"] | None
) -> Float32[Array, "R J M K"]:
    """What the only span read, by its weight beside the sinks."""
    weight = 1.0 if at_sinks is None else (1 / (1 + jnp.exp2(at_sinks[None] - lse)))[..., None]
    return jnp.where(lse[..., None] > NEG_INF, o * weight, 0)  # a span that nothing is read of holds anything


def _join_spans(
    o: Float32[Array, "X R J rows K"],
    lse: Float32[Array, "X R J rows"],
    at_sinks: Float32[Array, "J M"] | None,
    M: int,
    dtype: Any,
    *,
    interpret: bool,
) -> Float[Array, "R J M K"]:
    """What the spans read for the first M rows; one kernel instead of the three that XLA makes of it."""
    X, R, J, _, K = o.shape
    sinks = [] if at_sinks is None else [at_sinks]
    return pl.pallas_call(
        _join,
        jax.ShapeDtypeStruct((R, J, M, K), dtype),
        grid=(J, R),
        in_specs=[
            pl.BlockSpec((X, None, None, M, K), lambda j, r: (0, r, j, 0, 0)),
            pl.BlockSpec((X, None, None, M), lambda j, r: (0, r, j, 0)),
            *(pl.BlockSpec((None, M), lambda j, r: (j, 0)) for _ in sinks),
        ],
        out_specs=pl.BlockSpec((None, None, M, K), lambda j, r: (r, j, 0, 0)),
        compiler_params=plt.CompilerParams(num_warps=4),
        interpret=interpret,
        name="join_spans",
    )(o, lse, *sinks)


def _join(o_ref: Any, lse_ref: Any, *refs: Any) -> None:
    """What the spans read, by the sum of their weights, and of the sinks'."""
    *sinks, out_ref = refs
    X, M = lse_ref.shape
    least = jnp.full(M, NEG_INF, jnp.float32) if not sinks else sinks[0][...]
    peak = jax.lax.fori_loop(0, X, lambda x, peak: jnp.maximum(peak, lse_ref[x]), least)

    def add(x: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, values = carry
        lse = lse_ref[x]
        weight = jnp.where(lse > NEG_INF, jnp.exp2(lse - peak), 0)
        held = jnp.broadcast_to(weight[:, None] > 0, values.shape)
        # A span that nothing is read of holds anything.
        return total + weight, values + plt.load(o_ref.at[x], mask=held, other=0.0) * weight[:, None]

    total = jnp.zeros(M, jnp.float32) if not sinks else jnp.exp2(least - peak)
    total, values = jax.lax.fori_loop(0, X, add, (total, jnp.zeros(out_ref.shape, jnp.float32)))
    out_ref[...] = (values / jnp.maximum(total, 1e-30)[:, None]).astype(out_ref.dtype)


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
