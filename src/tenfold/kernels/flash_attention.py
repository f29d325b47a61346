"""Causal attention of packed rows on a GPU, tile by tile: FlashAttention-2 (Dao, 2023), in Pallas for Triton.

Scores stay on the chip: memory grows with a row's length, not with its square. Backward computes them again, once for
the queries' gradient and once for that of keys and values.

What a token sees are neighbours: from the start of its segment, window or chunk to itself. So the first token that each
one sees is all that the mask needs. It never moves backwards along a row, which says what tiles there are to visit, and
which of them every query sees whole and need no mask.

Dims: R rows, L tokens of a row, H query heads, J key-value heads, G = H / J, K head dim; of a tile Q queries, N keys.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from tenfold.kernels.attention import NEG_INF, AttentionSpec, masked_attention, segment_starts

LOG2_E = math.log2(math.e)  # exponentials are powers of 2, which the hardware has
SMALLEST_DIM = 16  # of the products that Triton has
KEPT = "attention"  # the name of results that rematerialisation does better to keep: they cost most to compute again


class Tile(NamedTuple):
    """How much one program works on at a time, by how many warps, and how many loads it keeps under way."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Those of the three kernels: forward, and the gradients of queries, and of keys and values."""

    forward: Tile
    to_q: Tile
    to_kv: Tile


def choose_tiles(K: int, dtype: DTypeLike) -> Tiles:
    """Tiles that fit the registers and the shared memory of a multiprocessor."""
    if jnp.dtype(dtype).itemsize > 2:
        side = 32 if K <= 128 else 16
        return Tiles(*[Tile(side, side, 4, 2)] * 3)
    if K <= 64:  # the fastest of some dozens on an H100
        return Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(128, 64, 4, 2))
    if K <= 128:
        return Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2))
    return Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2))


def flash_attention(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L J K"],
    v: Float[Array, "R L J K"],
    segments: Int[Array, "R L"],
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "R L H K"]:
    """What `attention.packed_attention` computes. The tokens of a segment must be neighbours.

    Args:
        q, k, v, segments, spec, sinks: as there.
        tiles: sizes that divide one another, of powers of 2; None chooses.
        interpret: run the kernels where there is no GPU, slowly, to test them.
    """
    L, K = q.shape[1], q.shape[3]
    if tiles is None:
        tiles = choose_tiles(K, q.dtype)
    longest = max(max(tile.queries, tile.keys) for tile in tiles)
    dim = max(SMALLEST_DIM, pl.next_power_of_2(K))
    first = jnp.pad(first_seen(segments, spec), ((0, 0), (0, -L % longest)), constant_values=L)
    q, k, v = (jnp.pad(x, ((0, 0), (0, -L % longest), (0, 0), (0, dim - K))) for x in (q, k, v))
    out: jax.Array = _attention(_Inputs(q, k, v, sinks), first, spec, tiles, interpret)
    return out[:, :L, :, :K]


def first_seen(segments: Int[Array, "R L"], spec: AttentionSpec) -> Int[Array, "R L"]:
    """The first token of its row that each token sees."""
    positions = jnp.arange(segments.shape[1])[None]
    starts = segment_starts(segments)
    first = starts
    if spec.window is not None:
        first = jnp.maximum(first, positions - spec.window + 1)
    if spec.chunk is not None:
        first = jnp.maximum(first, starts + (positions - starts) // spec.chunk * spec.chunk)
    return first.astype(jnp.int32)


def _last_seeing(first: Int[Array, "R L"]) -> Int[Array, "R L"]:
    """The last token of its row that sees each token: the inverse of `first_seen`."""
    tokens = jnp.arange(first.shape[1])
    return ((first[:, None, :] <= tokens[None, :, None]).sum(-1) - 1).astype(jnp.int32)


class _Inputs(NamedTuple):
    """What attention is differentiated by; or the gradients of that."""

    q: Any
    k: Any
    v: Any
    sinks: Any


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attention(inputs: _Inputs, first: Any, spec: AttentionSpec, tiles: Tiles, interpret: bool) -> jax.Array:
    return _forward_tiles(inputs, first, spec, tiles, interpret)[0]


def _forward(inputs: _Inputs, first: Any, spec: AttentionSpec, tiles: Tiles, interpret: bool) -> tuple[jax.Array, Any]:
    o, lse = (checkpoint_name(x, KEPT) for x in _forward_tiles(inputs, first, spec, tiles, interpret))
    return o, (inputs, first, o, lse)


def _backward(spec: AttentionSpec, tiles: Tiles, interpret: bool, kept: Any, to_o: jax.Array) -> tuple[_Inputs, None]:
    inputs, *known = kept
    return _backward_tiles(inputs, to_o, tuple(known), spec, tiles, interpret), None


_attention.defvjp(_forward, _backward)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _forward_tiles(
    inputs: _Inputs, first: Any, spec: AttentionSpec, tiles: Tiles, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """The outputs, and of every query the logarithm (to base 2) of the sum of its weights [R, H, L]."""
    q, k, v, sinks = inputs
    (R, L, H, K), J = q.shape, k.shape[2]
    tile = tiles.forward
    of_queries = pl.BlockSpec((None, tile.queries, None, K), lambda i, h, r: (r, i, h, 0))
    of_keys = pl.BlockSpec((None, L, None, K), lambda i, h, r: (r, 0, h * J // H, 0))
    of_sink = pl.BlockSpec((1,), lambda i, h, r: (h,))
    o, lse = _call(
        partial(_forward_kernel, scores=_Scores(spec, tile), has_sinks=sinks is not None),
        (L // tile.queries, H, R),
        [_of_tokens(tile.queries), of_queries, of_keys, of_keys, of_sink],
        [of_queries, _of_heads(tile.queries)],
        [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((R, H, L), jnp.float32)],
        tile,
        interpret,
    )(first, q, k, v, jnp.zeros(H, jnp.float32) if sinks is None else sinks.astype(jnp.float32))
    return o, lse


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _backward_tiles(
    inputs: _Inputs, to_o: jax.Array, known: Any, spec: AttentionSpec, tiles: Tiles, interpret: bool
) -> _Inputs:
    """The gradients, of what `_forward` kept."""
    (q, k, v, sinks), (first, o, lse) = inputs, known
    (R, L, H, K), J = q.shape, k.shape[2]
    shared = jnp.einsum("rlhk,rlhk->rhl", o, to_o, preferred_element_type=jnp.float32)

    tile = tiles.to_q
    of_queries = pl.BlockSpec((None, tile.queries, None, K), lambda i, h, r: (r, i, h, 0))
    of_keys = pl.BlockSpec((None, L, None, K), lambda i, h, r: (r, 0, h * J // H, 0))
    [to_q] = _call(
        partial(_to_q_kernel, scores=_Scores(spec, tile)),
        (L // tile.queries, H, R),
        [_of_tokens(tile.queries), of_queries, of_keys, of_keys, of_queries, *[_of_heads(tile.queries)] * 2],
        [of_queries],
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        tile,
        interpret,
    )(first, q, k, v, to_o, lse, shared)

    tile = tiles.to_kv
    of_queries = pl.BlockSpec((None, L, H // J, K), lambda i, j, r: (r, 0, j, 0))
    of_keys = pl.BlockSpec((None, tile.keys, None, K), lambda i, j, r: (r, i, j, 0))
    of_row = pl.BlockSpec((None, L), lambda i, j, r: (r, 0))
    of_heads = pl.BlockSpec((None, H // J, L), lambda i, j, r: (r, j, 0))
    to_k, to_v = _call(
        partial(_to_kv_kernel, scores=_Scores(spec, tile)),
        (L // tile.keys, J, R),
        [of_row, _of_tokens(tile.keys), of_queries, of_keys, of_keys, of_queries, of_heads, of_heads],
        [of_keys, of_keys],
        [jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        tile,
        interpret,
    )(first, _last_seeing(first), q, k, v, to_o, lse, shared)

    to_sinks = None
    if sinks is not None:
        weights = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse / LOG2_E)
        to_sinks = -(weights * shared).sum((0, 2)).astype(sinks.dtype)
    return _Inputs(to_q, to_k, to_v, to_sinks)


# Second derivatives, such as products with a Hessian, are those of the definition: kernels have none.


@_forward_tiles.defjvp
def _(spec: AttentionSpec, tiles: Tiles, interpret: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    inputs, first = primals
    o, lse = _forward_tiles(inputs, first, spec, tiles, interpret)
    _, moved = jax.jvp(lambda inputs: _definition(inputs, first, spec), (inputs,), tangents[:1])
    return (o, lse), (moved, jnp.zeros_like(lse))  # nothing that is differentiated reads how the logarithm moves


@_backward_tiles.defjvp
def _(spec: AttentionSpec, tiles: Tiles, interpret: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    inputs, to_o, known = primals

    def gradients(inputs: _Inputs, to_o: jax.Array) -> _Inputs:
        return jax.vjp(lambda inputs: _definition(inputs, known[0], spec), inputs)[1](to_o)[0]

    _, moved = jax.jvp(gradients, (inputs, to_o), tangents[:2])
    return _backward_tiles(inputs, to_o, known, spec, tiles, interpret), moved


def _definition(inputs: _Inputs, first: Int[Array, "R L"], spec: AttentionSpec) -> Float[Array, "R L H K"]:
    """What the kernels compute, in plain XLA."""
    tokens = jnp.arange(first.shape[1])[None]
    seen = (tokens[:, None, :] <= tokens[:, :, None]) & (tokens[:, None, :] >= first[:, :, None])
    return masked_attention(inputs.q, inputs.k, inputs.v, seen, spec, inputs.sinks)


def _of_tokens(size: int) -> pl.BlockSpec:
    """A tile of what there is once for each token [R, L]."""
    return pl.BlockSpec((None, size), lambda i, h, r: (r, i))


def _of_heads(size: int) -> pl.BlockSpec:
    """A tile of what there is once for each token of a head [R, H, L]."""
    return pl.BlockSpec((None, None, size), lambda i, h, r: (r, h, i))


def _call(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    in_specs: list[pl.BlockSpec],
    out_specs: list[pl.BlockSpec],
    out_shape: list[jax.ShapeDtypeStruct],
    tile: Tile,
    interpret: bool,
) -> Callable[..., Any]:
    return pl.pallas_call(
        kernel,
        out_shape,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name=f"flash_attention{kernel.func.__name__.removesuffix('_kernel')}",  # pyright: ignore[reportFunctionMemberAccess]
    )


class _Scores(NamedTuple):
    """What all kernels compute again and again: the scores of a tile, in powers of 2."""

    spec: AttentionSpec
    tile: Tile

    def of(self, q: jax.Array, k: jax.Array) -> tuple[Float32[Array, "Q N"], Float32[Array, "Q N"] | None]:
        """Scores, and what their gradient is to be multiplied with because of the soft-cap."""
        s = _product(q, k, trans_b=True)
        cap = self.spec.softcap
        if cap is None:
            return s * (self.spec.scale * LOG2_E), None
        capped = jnp.tanh(s * (self.spec.scale / cap))
        return capped * (cap * LOG2_E), 1 - capped * capped

    def mask(self, s: jax.Array, first: Int[Array, " Q"], query: jax.Array, key: jax.Array) -> jax.Array:
        """The scores of the tile that starts at `query` and `key`, without those that a query does not see."""
        queries, keys = query + jnp.arange(self.tile.queries), key + jnp.arange(self.tile.keys)
        seen = (keys[None, :] <= queries[:, None]) & (keys[None, :] >= first[:, None])
        return jnp.where(seen, s, NEG_INF)

    def to_scores(self, p: jax.Array, cap: jax.Array | None, to_p: jax.Array, shared: jax.Array) -> jax.Array:
        """The gradient of products of queries and keys, but for the scale."""
        to_s = p * (to_p - shared[:, None])
        return to_s if cap is None else to_s * cap


def _product(a: jax.Array, b: jax.Array, **transposed: bool) -> Float32[Array, "A B"]:
    """Float32 products stay such: tf32 would keep 10 bits of them."""
    return plt.dot(a, b, allow_tf32=False, **transposed)


def _visit(
    lower: jax.Array, whole: tuple[jax.Array, jax.Array], upper: jax.Array, step: Callable[..., Any], carry: Any
) -> Any:
    """Tiles [lower, upper), of which those within `whole` need no mask."""
    begin = jnp.clip(whole[0], lower, upper)
    end = jnp.clip(whole[1], begin, upper)
    carry = jax.lax.fori_loop(lower, begin, partial(step, masked=True), carry)
    carry = jax.lax.fori_loop(begin, end, partial(step, masked=False), carry)
    return jax.lax.fori_loop(end, upper, partial(step, masked=True), carry)


def _visit_keys(
    first: jax.Array, query: jax.Array, length: int, tile: Tile, step: Callable[..., Any], carry: Any
) -> Any:
    """The tiles of keys that the queries from `query` on see."""
    Q, N = tile.queries, tile.keys
    upper = jnp.minimum((query + Q + N - 1) // N, length // N)
    return _visit(first.min() // N, ((first.max() + N - 1) // N, (query + 1) // N), upper, step, carry)


def _forward_kernel(*refs: Any, scores: _Scores, has_sinks: bool) -> None:
    first_ref, q_ref, k_ref, v_ref, sink_ref, o_ref, lse_ref = refs
    Q, N = scores.tile.queries, scores.tile.keys
    query = pl.program_id(0) * Q
    first, q = first_ref[...], q_ref[...]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array], *, masked: bool) -> Any:
        peak, total, values = carry
        keys = pl.ds(i * N, N)
        s, _ = scores.of(q, k_ref[keys, :])
        if masked:
            s = scores.mask(s, first, query, i * N)
        new_peak = jnp.maximum(peak, s.max(1))
        p = jnp.exp2(s - new_peak[:, None])
        rescale = jnp.exp2(peak - new_peak)
        values = values * rescale[:, None] + _product(p.astype(v_ref.dtype), v_ref[keys, :])
        return new_peak, total * rescale + p.sum(1), values

    peak, total = jnp.full(Q, NEG_INF, jnp.float32), jnp.zeros(Q, jnp.float32)
    if has_sinks:
        peak, total = jnp.zeros(Q, jnp.float32) + sink_ref[0] * LOG2_E, total + 1
    values = jnp.zeros(q.shape, jnp.float32)
    peak, total, values = _visit_keys(first, query, k_ref.shape[0], scores.tile, step, (peak, total, values))
    o_ref[...] = (values / total[:, None]).astype(o_ref.dtype)
    lse_ref[...] = peak + jnp.log2(total)


def _to_q_kernel(*refs: Any, scores: _Scores) -> None:
    first_ref, q_ref, k_ref, v_ref, to_o_ref, lse_ref, shared_ref, to_q_ref = refs
    Q, N = scores.tile.queries, scores.tile.keys
    query = pl.program_id(0) * Q
    first, q, to_o, lse, shared = (ref[...] for ref in (first_ref, q_ref, to_o_ref, lse_ref, shared_ref))

    def step(i: jax.Array, to_q: jax.Array, *, masked: bool) -> jax.Array:
        keys = pl.ds(i * N, N)
        k = k_ref[keys, :]
        s, cap = scores.of(q, k)
        if masked:
            s = scores.mask(s, first, query, i * N)
        p = jnp.exp2(s - lse[:, None])
        to_s = scores.to_scores(p, cap, _product(to_o, v_ref[keys, :], trans_b=True), shared)
        return to_q + _product(to_s.astype(k.dtype), k)

    to_q = _visit_keys(first, query, k_ref.shape[0], scores.tile, step, jnp.zeros(q.shape, jnp.float32))
    to_q_ref[...] = (to_q * scores.spec.scale).astype(to_q_ref.dtype)


def _to_kv_kernel(*refs: Any, scores: _Scores) -> None:
    first_ref, last_ref, q_ref, k_ref, v_ref, to_o_ref, lse_ref, shared_ref, to_k_ref, to_v_ref = refs
    Q, N = scores.tile.queries, scores.tile.keys
    key = pl.program_id(0) * N
    last, k, v = last_ref[...], k_ref[...], v_ref[...]
    whole = (key + N - 1 + Q - 1) // Q, (last.min() + 1) // Q

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array], *, head: jax.Array, masked: bool) -> Any:
        to_k, to_v = carry
        queries = pl.ds(i * Q, Q)
        q, to_o = q_ref[queries, head, :], to_o_ref[queries, head, :]
        s, cap = scores.of(q, k)
        if masked:
            s = scores.mask(s, first_ref[queries], i * Q, key)
        p = jnp.exp2(s - lse_ref[head, queries][:, None])
        to_v += _product(p.astype(to_o.dtype), to_o, trans_a=True)
        to_s = scores.to_scores(p, cap, _product(to_o, v, trans_b=True), shared_ref[head, queries])
        return to_k + _product(to_s.astype(q.dtype), q, trans_a=True), to_v

    def of_head(head: jax.Array, carry: tuple[jax.Array, jax.Array]) -> Any:
        return _visit(key // Q, whole, last.max() // Q + 1, partial(step, head=head), carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    to_k, to_v = jax.lax.fori_loop(0, q_ref.shape[1], of_head, (zeros, zeros))
    to_k_ref[...] = (to_k * scores.spec.scale).astype(to_k_ref.dtype)
    to_v_ref[...] = to_v.astype(to_v_ref.dtype)
