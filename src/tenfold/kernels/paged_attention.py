"""Attention of packed ragged tokens over a paged key-value cache, in plain XLA.

Work follows the data, not the shapes: loops run over the pages that a sequence has and the query blocks that a step
holds, so one compiled program serves every mix of prefill and decode of its token bucket. Softmax is accumulated
online (Milakov and Gimelshein, 2018), always over the same chunks of the sequence, so that a token's result does not
depend on what else is in the batch or on how its prompt was cut into steps.

A cache may hold its elements in 8 bits, as int8 or fp8 (e4m3fn), with a float32 scale for every token of a head, so
that the largest magnitude there becomes the largest code. fp8 has scales too: without, values above 448 would be cut
off and those below 2^-6 lose bits, to save 4 bytes beside a head of 64 or 128.

Dims: T packed tokens, S sequences, H query heads, J key-value heads, G = H / J, K head dim, P pages, B tokens of a
page, N pages of the longest sequence, C pages of a chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from tenfold.kernels.attention import NEG_INF, AttentionSpec, on_gpu, scores_mask, soft_cap, softmax
from tenfold.kernels.paged_flash_attention import attend_pages, has_tiles, query_block

CHUNK_TOKENS = 256  # keys that one pass of the softmax covers
QUERY_BLOCK = 64  # prefill queries that share one pass over the keys
DECODE_ROWS = 8  # decoding sequences that share one pass over the keys
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}  # element of each 8-bit type


class PagedCache(NamedTuple):
    """The keys and values of one layer. Page 0 is the null page: padding is written there and nothing reads it.

    Keys lie transposed within a page, so that scores are products of a row with a matrix, the fast case on a CPU.
    Elements of 8 bits have a scale for every token of a head.
    """

    k: Shaped[Array, "P J K B"]
    v: Shaped[Array, "P J B K"]
    k_scales: Float[Array, "P J B"] | None = None
    v_scales: Float[Array, "P J B"] | None = None


class NativeCache(NamedTuple):
    """The same for the native operations of a CPU, in words of u = 4 / (bytes of an element) neighbours along the dim
    that is added over. See src/native/attention.h."""

    k: Shaped[Array, "P J K/u B u"]
    v: Shaped[Array, "P J B/u K u"]
    k_scales: Float[Array, "P J B"] | None = None
    v_scales: Float[Array, "P J B"] | None = None


Cache = PagedCache | NativeCache


class RaggedBatch(NamedTuple):
    """Which tokens of a step belong to which sequence. Rows are sorted: first those with a single query token.

    Attributes:
        block_tables: [S, N] page of each block of a sequence; 0 where it has none (or no longer needs it).
        kv_lens: [S] tokens of the sequence once this step's are written; 0 for padding rows.
        query_starts: [S + 1] first packed token of each row.
        num_decodes: rows [0, num_decodes) have one query token each and are computed together.
        num_seqs: rows in use.
    """

    block_tables: Int[Array, "S N"]
    kv_lens: Int[Array, " S"]
    query_starts: Int[Array, " S+1"]
    num_decodes: Int[Array, ""]
    num_seqs: Int[Array, ""]


def make_cache(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> PagedCache:
    """An empty cache of `num_pages` pages, the null page among them."""
    k_scales, v_scales = _make_scales(num_pages, page_size, num_kv_heads, dtype)
    return PagedCache(
        k=jnp.zeros((num_pages, num_kv_heads, head_dim, page_size), dtype),
        v=jnp.zeros((num_pages, num_kv_heads, page_size, head_dim), dtype),
        k_scales=k_scales,
        v_scales=v_scales,
    )


def make_native_cache(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike
) -> NativeCache:
    """An empty cache for the native operations, of a dtype that they have; head and page hold whole words."""
    together = 4 // jnp.dtype(dtype).itemsize
    k_scales, v_scales = _make_scales(num_pages, page_size, num_kv_heads, dtype)
    return NativeCache(
        k=jnp.zeros((num_pages, num_kv_heads, head_dim // together, page_size, together), dtype),
        v=jnp.zeros((num_pages, num_kv_heads, page_size // together, head_dim, together), dtype),
        k_scales=k_scales,
        v_scales=v_scales,
    )


def _make_scales(
    num_pages: int, page_size: int, num_kv_heads: int, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array] | tuple[None, None]:
    """Those of keys and of values, arrays of their own as each is donated."""
    if jnp.dtype(dtype) not in LARGEST:
        return None, None
    shape = (num_pages, num_kv_heads, page_size)
    return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)


def has_native_cache(page_size: int, head_dim: int, dtype: DTypeLike) -> bool:
    """Whether the native operations can hold such pages."""
    together = 4 // jnp.dtype(dtype).itemsize
    known = jnp.dtype(dtype).name in ("float32", "bfloat16", "int8", "float8_e4m3fn")
    return known and page_size % max(together, 8) == 0 and head_dim % together == 0


def page_bytes(page_size: int, num_kv_heads: int, head_dim: int, dtype: DTypeLike) -> int:
    """Bytes of one page of one layer."""
    scales = 4 if jnp.dtype(dtype) in LARGEST else 0
    return 2 * page_size * num_kv_heads * (head_dim * jnp.dtype(dtype).itemsize + scales)


def update(
    q: Float[Array, "T H K"],
    k: Float[Array, "T J K"],
    v: Float[Array, "T J K"],
    cache: NativeCache,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
) -> tuple[Float[Array, "T H K"], NativeCache]:
    """Stores this step's keys and values in a native cache, in place when it is donated, and attends to it.

    What `write` and `paged_attention` do together. A token's result depends on nothing but its own sequence, to the
    last bit, however the sequence was cut into steps.
    """
    held = [x for x in cache if x is not None]
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *held)]
    aliases = {7 + i: 1 + i for i in range(len(held))}
    call = jax.ffi.ffi_call("tenfold_paged_attention_update", results, input_output_aliases=aliases)
    out, *held = call(
        q,
        k,
        v,
        batch.block_tables,
        batch.kv_lens,
        batch.query_starts,
        batch.num_seqs,
        *held,
        *(() if sinks is None else (sinks.astype(jnp.float32),)),
        scale=np.float32(spec.scale),
        window=np.int64(spec.window or 0),
        chunk=np.int64(spec.chunk or 0),
        softcap=np.float32(spec.softcap or 0),
    )
    return out, NativeCache(*held)


def read(
    q: Float[Array, "T H K"],
    cache: NativeCache,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "T H K"]:
    """Attends to a native cache that holds this step's keys and values already: what `update` does after storing."""
    call = jax.ffi.ffi_call("tenfold_paged_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))
    return call(
        q,
        batch.block_tables,
        batch.kv_lens,
        batch.query_starts,
        batch.num_seqs,
        *(x for x in cache if x is not None),
        *(() if sinks is None else (sinks.astype(jnp.float32),)),
        scale=np.float32(spec.scale),
        window=np.int64(spec.window or 0),
        chunk=np.int64(spec.chunk or 0),
        softcap=np.float32(spec.softcap or 0),
    )


def write(
    cache: PagedCache,
    k: Float[Array, "T J K"],
    v: Float[Array, "T J K"],
    pages: Int[Array, " T"],
    offsets: Int[Array, " T"],
) -> PagedCache:
    """Stores each token's key and value at (page, offset); in place when the cache is donated.

    Values are made finite: a page that is given to another sequence is read before it is full, and its old values are
    multiplied by 0, which must give 0.
    """
    k_scales, v_scales = cache.k_scales, cache.v_scales
    if k_scales is None or v_scales is None:
        k, v = k.astype(cache.k.dtype), jnp.nan_to_num(v.astype(cache.v.dtype))
    else:
        k, new_k_scales = _codes(k, cache.k.dtype)
        v, new_v_scales = _codes(jnp.nan_to_num(v), cache.v.dtype)
        k_scales = k_scales.at[pages, :, offsets].set(new_k_scales, mode="promise_in_bounds")
        v_scales = v_scales.at[pages, :, offsets].set(new_v_scales, mode="promise_in_bounds")
    k_pages = cache.k.at[pages, :, :, offsets].set(k, mode="promise_in_bounds")
    v_pages = cache.v.at[pages, :, offsets, :].set(v, mode="promise_in_bounds")
    return PagedCache(k_pages, v_pages, k_scales, v_scales)


def _codes(x: Float[Array, "T J K"], dtype: DTypeLike) -> tuple[Shaped[Array, "T J K"], Float[Array, "T J"]]:
    """Elements of 8 bits and their scales. The scale of a head in which something is not finite is NaN."""
    wide = x.astype(jnp.float32)
    peak = jnp.abs(wide).max(-1)
    largest = LARGEST[jnp.dtype(dtype)]
    held = (peak > 1e-30) & jnp.isfinite(peak)
    codes = jnp.where(held[..., None], wide * (largest / jnp.where(held, peak, 1.0))[..., None], 0.0)
    codes = jnp.rint(codes) if dtype == jnp.int8 else codes
    return codes.astype(dtype), jnp.where(jnp.isfinite(peak), peak / largest, jnp.nan)


def _read(
    cache: PagedCache, pages: Int[Array, "*n"], dtype: DTypeLike
) -> tuple[Float[Array, "*n J K B"], Float[Array, "*n J B K"]]:
    """The keys and values of some pages; those of 8 bits in `dtype`."""

    def take(x: jax.Array) -> jax.Array:
        return x.at[pages].get(mode="promise_in_bounds")

    k, v = take(cache.k), take(cache.v)
    if cache.k_scales is not None and cache.v_scales is not None:
        k = (k.astype(jnp.float32) * take(cache.k_scales)[..., None, :]).astype(dtype)
        v = (v.astype(jnp.float32) * take(cache.v_scales)[..., None]).astype(dtype)
    return k, v


def reference(
    q: Float[Array, "T H K"],
    cache: PagedCache,
    batch: RaggedBatch,
    positions: Int[Array, " T"],
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "T H K"]:
    """The definition: every token against its whole sequence. Memory grows with T · N · B; for tests."""
    T, H, K = q.shape
    J, B = cache.k.shape[1], cache.k.shape[3]
    rows = jnp.searchsorted(batch.query_starts, jnp.arange(T), side="right") - 1
    tables = batch.block_tables[jnp.clip(rows, 0, batch.block_tables.shape[0] - 1)]
    k, v = _read(cache, tables, q.dtype)
    k, v = k.transpose(0, 1, 4, 2, 3).reshape(T, -1, J, K), v.transpose(0, 1, 3, 2, 4).reshape(T, -1, J, K)
    scores = jnp.einsum("tjgk,tsjk->tjgs", q.reshape(T, J, H // J, K), k, preferred_element_type=jnp.float32)
    scores = soft_cap(scores * spec.scale, spec.softcap)
    mask = scores_mask(positions[:, None], jnp.arange(tables.shape[1] * B)[None, :], spec.reach)
    scores = jnp.where(mask[:, None, None], scores, NEG_INF)
    weights = softmax(scores, None if sinks is None else sinks.reshape(1, J, H // J))
    return jnp.einsum("tjgs,tsjk->tjgk", weights.astype(v.dtype), v).reshape(T, H, K).astype(q.dtype)


def paged_attention(
    q: Float[Array, "T H K"],
    cache: PagedCache,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
    *,
    decode_only: bool = False,
) -> Float[Array, "T H K"]:
    """Causal attention of each row's query tokens, its last ones, over its pages.

    Args:
        q: packed queries; row r owns tokens [query_starts[r], query_starts[r + 1]).
        cache: holds the keys and values of this step's tokens too.
        batch: the rows.
        spec: scale, reach, soft-cap.
        sinks: as in `Heads`.
        decode_only: every row has one query token; compiles no code for others.

    Returns:
        The packed outputs; tokens past the last row hold no meaning.
    """
    B, K, H, J = cache.k.shape[3], q.shape[2], q.shape[1], cache.k.shape[1]
    if on_gpu() and has_tiles(B, K):
        attend = partial(attend_pages, cache=cache, sinks=sinks, spec=spec)
        return attend_at_once(attend, q, batch, query_block(H, J), decode_only=decode_only)
    pages = max(1, CHUNK_TOKENS // B)
    attend = partial(_attend, cache=cache, sinks=sinks, spec=spec, pages=pages)
    return attend_rows(attend, q, q.shape[2], batch, pages, decode_only=decode_only)


def attend_rows(
    attend: Callable[..., jax.Array],
    q: Float[Array, "T H K"],
    dim: int,
    batch: RaggedBatch,
    pages: int,
    *,
    decode_only: bool,
) -> Float[Array, "T H V"]:
    """Calls `attend` for all queries, several rows or a block of one row at a time.

    Args:
        attend: attends with queries [R, Q, H, K], the `tables` [R, N] of their sequences and their `positions` [R, Q],
            where -1 is padding; gives [R, Q, H, V].
        q: packed queries.
        dim: V.
        batch: the rows.
        pages: that `attend` reads at a time.
        decode_only: every row has one query token.
    """
    batch = pad_tables(batch, pages)
    out = attend_decodes(attend, q, dim, batch)
    return out if decode_only else attend_prefills(attend, q, out, batch)


def attend_at_once(
    attend: Callable[..., jax.Array], q: Float[Array, "T H K"], batch: RaggedBatch, size: int, *, decode_only: bool
) -> Float[Array, "T H K"]:
    """What `attend_rows` computes, by two calls of `attend`: for all rows with one query token, and for all others.

    These are cut into blocks of `size` queries, of which there can be so many as T tokens in S rows make.
    """
    T, S = q.shape[0], batch.kv_lens.shape[0]
    rows = min(S, T)
    lens = jnp.where(jnp.arange(rows) < batch.num_decodes, batch.kv_lens[:rows], 0)
    out = attend(q[:rows, None], tables=batch.block_tables[:rows], positions=lens[:, None] - 1)[:, 0]
    if decode_only:
        return jnp.pad(out, ((0, T - rows), (0, 0), (0, 0)))
    lengths = batch.query_starts[1:] - batch.query_starts[:-1]
    row = jnp.arange(S)
    prefills = (row >= batch.num_decodes) & (row < batch.num_seqs)
    blocks = jnp.where(prefills, (lengths + size - 1) // size, 0)
    ends = jnp.cumsum(blocks)
    i = jnp.arange(T // size + S)
    r = jnp.minimum(jnp.searchsorted(ends, i, side="right"), S - 1)
    within = (i - ends[r] + blocks[r])[:, None] * size + jnp.arange(size)[None]  # queries of the row, counted
    held = (i < ends[-1])[:, None] & (within < lengths[r][:, None])
    tokens = jnp.where(held, batch.query_starts[r][:, None] + within, T)
    positions = jnp.where(held, (batch.kv_lens - lengths)[r][:, None] + within, -1)
    o = attend(q.at[tokens].get(mode="fill", fill_value=0), tables=batch.block_tables[r], positions=positions)
    out = jnp.pad(out, ((0, T - rows), (0, 0), (0, 0)))
    return out.at[tokens].set(o, mode="drop")


def pad_tables(batch: RaggedBatch, pages: int) -> RaggedBatch:
    """The batch with tables for whole groups of rows, and of a multiple of `pages` blocks."""
    rows, blocks = batch.block_tables.shape
    return batch._replace(block_tables=jnp.pad(batch.block_tables, ((0, -rows % DECODE_ROWS), (0, -blocks % pages))))


def attend_decodes(
    attend: Callable[..., jax.Array], q: Float[Array, "T H K"], dim: int, batch: RaggedBatch
) -> Float[Array, "T H V"]:
    """The rows with one query token, several at a time: token r is row r. Those of other rows become zeros.

    Arguments are those of `attend_rows`, with a batch of `pad_tables`.
    """
    T = q.shape[0]
    rows = min(DECODE_ROWS, T)
    kv_lens = jnp.pad(batch.kv_lens, (0, rows))
    q = jnp.pad(q, ((0, rows), (0, 0), (0, 0)))

    def group(i: jax.Array, out: jax.Array) -> jax.Array:
        first = i * rows
        lens = jax.lax.dynamic_slice_in_dim(kv_lens, first, rows)
        lens = jnp.where(first + jnp.arange(rows) < batch.num_decodes, lens, 0)
        tables = jax.lax.dynamic_slice_in_dim(batch.block_tables, first, rows)
        queries = jax.lax.dynamic_slice_in_dim(q, first, rows)
        o = attend(queries[:, None], tables=tables, positions=lens[:, None] - 1)
        return jax.lax.dynamic_update_slice_in_dim(out, o[:, 0].astype(out.dtype), first, 0)

    out = jnp.zeros((T + rows, q.shape[1], dim), q.dtype)
    return jax.lax.fori_loop(0, (batch.num_decodes + rows - 1) // rows, group, out)[:T]


def attend_prefills(
    attend: Callable[..., jax.Array],
    q: Float[Array, "T H K"],
    out: Float[Array, "T H V"],
    batch: RaggedBatch,
    size: int = QUERY_BLOCK,
) -> Float[Array, "T H V"]:
    """The other rows, in blocks of `size` queries of one sequence, into `out`.

    Arguments are those of `attend_rows`, with a batch of `pad_tables`. What a block writes past its row, the next
    overwrites.
    """
    T, S = q.shape[0], batch.kv_lens.shape[0]
    row = jnp.arange(S)
    lengths = batch.query_starts[1:] - batch.query_starts[:-1]
    prefills = (row >= batch.num_decodes) & (row < batch.num_seqs)
    ends = jnp.cumsum(jnp.where(prefills, (lengths + size - 1) // size, 0))
    q, out = (jnp.pad(x, ((0, size), (0, 0), (0, 0))) for x in (q, out))

    def block(i: jax.Array, out: jax.Array) -> jax.Array:
        r = jnp.searchsorted(ends, i, side="right")
        skipped = (i - (ends[r] - (lengths[r] + size - 1) // size)) * size
        start = batch.query_starts[r] + skipped
        first = batch.kv_lens[r] - lengths[r] + skipped
        positions = first + jnp.arange(size)
        positions = jnp.where(positions < batch.kv_lens[r], positions, -1)
        queries = jax.lax.dynamic_slice_in_dim(q, start, size)
        o = attend(queries[None], tables=batch.block_tables[r][None], positions=positions[None])
        return jax.lax.dynamic_update_slice_in_dim(out, o[0].astype(out.dtype), start, 0)

    return jax.lax.fori_loop(0, ends[-1], block, out)[:T]


@partial(jax.jit, static_argnames=("spec", "pages"))  # traced once for all the layers that call it alike
def _attend(
    q: Float[Array, "R Q H K"],
    cache: PagedCache,
    tables: Int[Array, "R N"],
    positions: Int[Array, "R Q"],
    sinks: Float[Array, " H"] | None,
    spec: AttentionSpec,
    pages: int,
) -> Float[Array, "R Q H K"]:
    """Online softmax of R sequences with Q queries each over their pages, `pages` at a time; position -1 is padding."""
    R, Q, H, K = q.shape
    J, B = cache.k.shape[1], cache.k.shape[3]
    G, chunk = H // J, pages * B
    q = (q * jnp.asarray(spec.scale, q.dtype)).reshape(R, Q, J, G, K).transpose(0, 2, 1, 3, 4).reshape(R, J, Q * G, K)

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        peak, total, acc = carry
        chosen = jax.lax.dynamic_slice_in_dim(tables, i * pages, pages, axis=1)
        k, v = _read(cache, chosen, q.dtype)  # R C J K B, R C J B K
        scores = _scores(q, k)
        scores = soft_cap(scores, spec.softcap).reshape(R, J, Q, G, chunk)
        keys = i * chunk + jnp.arange(chunk)
        mask = scores_mask(positions[:, :, None], keys[None, None, :], spec.reach)[:, None, :, None, :]
        scores = jnp.where(mask, scores, NEG_INF).reshape(R, J, Q * G, chunk)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.where(scores <= NEG_INF, 0, jnp.exp(scores - new_peak[..., None]))
        rescale = jnp.exp(peak - new_peak)
        total = total * rescale + weights.sum(-1)
        acc = acc * rescale[..., None] + _weighted_values(weights.astype(v.dtype), v)
        return new_peak, total, acc

    earliest = jnp.where(positions < 0, 2**30, positions).min()
    first = 0  # the earliest key that any query sees
    if spec.window is not None:
        first = jnp.maximum(earliest - spec.window + 1, first)
    if spec.chunk is not None:
        first = jnp.maximum(earliest // spec.chunk * spec.chunk, first)
    peak, total = jnp.full((R, J, Q * G), NEG_INF, jnp.float32), jnp.zeros((R, J, Q * G), jnp.float32)
    if sinks is not None:  # the first key that is seen
        peak = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(J, 1, G), (R, J, Q, G)).reshape(R, J, Q * G)
        total = jnp.ones_like(total)
    carry = peak, total, jnp.zeros((R, J, Q * G, K), jnp.float32)
    _, total, acc = jax.lax.fori_loop(first // chunk, positions.max() // chunk + 1, step, carry)
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    return out.reshape(R, J, Q, G, K).transpose(0, 2, 1, 3, 4).reshape(R, Q, H, K)


def _scores(q: Float[Array, "R J M K"], k: Float[Array, "R C J K B"]) -> Float[Array, "R J M CB"]:
    """Products of the queries with a chunk of keys. Few rows multiply page by page; many share one wide product."""
    R, J, M, K = q.shape
    C, B = k.shape[1], k.shape[4]
    if M <= B:
        per_page = jnp.einsum(
            "rcjmk,rcjkb->rcjmb", jnp.broadcast_to(q[:, None], (R, C, J, M, K)), k, preferred_element_type=jnp.float32
        )
        return per_page.transpose(0, 2, 3, 1, 4).reshape(R, J, M, C * B)
    wide = k.transpose(0, 2, 3, 1, 4).reshape(R, J, K, C * B)
    return jnp.einsum("rjmk,rjks->rjms", q, wide, preferred_element_type=jnp.float32)


def _weighted_values(weights: Float[Array, "R J M CB"], v: Float[Array, "R C J B K"]) -> Float[Array, "R J M K"]:
    """The values of a chunk summed by weight."""
    R, J, M, _ = weights.shape
    C, B, K = v.shape[1], v.shape[3], v.shape[4]
    if M <= B:
        per_page = weights.reshape(R, J, M, C, B).transpose(0, 3, 1, 2, 4)
        return jnp.einsum("rcjmb,rcjbk->rcjmk", per_page, v, preferred_element_type=jnp.float32).sum(1)
    long = v.transpose(0, 2, 1, 3, 4).reshape(R, J, C * B, K)
    return jnp.einsum("rjms,rjsk->rjmk", weights, long, preferred_element_type=jnp.float32)
