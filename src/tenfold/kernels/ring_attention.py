"""Causal attention of rows whose tokens are shared out over devices: ring attention (Liu et al., 2023).

Every device keeps its queries. Keys and values go round: at each step a device attends to those that it has, adds the
result to what it knows (online softmax: Milakov and Gimelshein, 2018), and hands them on. The gradient goes round once
more, and the keys' and values' own gradients travel with them. So no device ever holds more than two shares of keys and
values, nor scores of more than its own queries with one share. Beside stages of a pipeline, a step gathers all shares.

The tokens of a device are two chunks of its row, "zig-zag" as in `parallel.layout`. Of the scores with another device's
chunks one half is masked whichever device that is: its later chunk for all queries, or both for the earlier queries.
That half is not computed. Which other scores are masked is told by positions and segments.

Dims: R rows, N tokens that a device has of a row, H query heads, J key-value heads, G = H / J, K key dim, V value dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from tenfold.kernels.attention import NEG_INF, AttentionSpec, scores_mask, soft_cap


class Places(NamedTuple):
    """Where the tokens of a device stand, which says who sees whom.

    Attributes:
        positions: in their rows; or in their segments, which a spec with chunks needs.
        segments: tokens see only tokens of the same id in the same row.
    """

    positions: Int[Array, "R N"]
    segments: Int[Array, "R N"]


class _Softmax(NamedTuple):
    """Of every query: the largest score, the sum of weights relative to it, and the sum of weighed values."""

    peak: Float32[Array, "R J G N"]
    total: Float32[Array, "R J G N"]
    values: Float32[Array, "R J G N V"]


class _Queries(NamedTuple):
    """What the gradient knows of queries.

    Attributes:
        q: they, and where they stand.
        to_o: the gradient of what they read.
        lse: the logarithm of the sum of their exponentiated scores.
        shared: what the gradient of every score of a query is less by: of its softmax's sum.
    """

    q: Float[Array, "R q H K"]
    at: Places
    to_o: Float[Array, "R J G q V"]
    lse: Float32[Array, "R J G q"]
    shared: Float32[Array, "R J G q"]


class Ring(NamedTuple):
    """The devices that rows are shared out over.

    Attributes:
        axis: of the mesh.
        size: how many they are.
        alone: whether other devices of the mesh may be at something else meanwhile, such as other stages of a pipeline.
    """

    axis: str
    size: int
    alone: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def ring_attention(
    q: Float[Array, "R N H K"],
    k: Float[Array, "R N J K"],
    v: Float[Array, "R N J V"],
    sinks: Float[Array, " H"] | None,
    places: Places,
    spec: AttentionSpec,
    ring: Ring,
) -> Float[Array, "R N H V"]:
    """What `attention.packed_attention` computes, of the tokens of one device; to be called within a `shard_map`.

    Args:
        q, k, v: of the device's tokens, whose first half is of an earlier chunk of the row than the second.
        sinks: as in `attention.Heads`.
        places: of the same tokens.
        spec: scale, reach and soft-cap.
        ring: the devices that rows are shared out over.
    """
    return _forward(q, k, v, sinks, places, spec, ring)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, places: Places, spec: AttentionSpec, ring: Ring
) -> tuple[jax.Array, Any]:
    (R, N, H, _), (J, V) = q.shape, v.shape[2:]
    shape = (R, J, H // J, N)
    if sinks is None:
        start = jnp.full(shape, NEG_INF, jnp.float32), jnp.zeros(shape, jnp.float32)
    else:
        peak = jnp.broadcast_to(sinks.astype(jnp.float32).reshape(1, J, H // J, 1), shape)
        start = peak, jnp.ones(shape, jnp.float32)
    known = _attend(_Softmax(*start, jnp.zeros((*shape, V), jnp.float32)), q, k, v, places, places, spec)

    def step(carry: tuple[_Softmax, Any], i: jax.Array) -> tuple[Any, None]:
        known, passing = carry[0], _pass_on(carry[1], ring)

        def earlier(known: _Softmax, passing: Any) -> _Softmax:
            k, v, at = passing
            k, v, at = _half(0, (k, v, at))
            return _attend(known, q, k, v, places, at, spec)

        def later(known: _Softmax, passing: Any) -> _Softmax:
            k, v, at = passing
            first, second = (_half(i, known, dim=3) for i in (0, 1))
            second = _attend(second, _half(1, q), k, v, _half(1, places), at, spec)
            return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=3), first, second)

        return (jax.lax.cond(_is_earlier(i, ring), earlier, later, known, passing), passing), None

    (known, _), _ = jax.lax.scan(step, (known, (k, v, places)), jnp.arange(1, ring.size))
    lse = known.peak + jnp.log(known.total)
    o = jnp.moveaxis(known.values / known.total[..., None], 3, 1).reshape(R, N, H, V).astype(v.dtype)
    return o, (q, k, v, sinks, places, o, lse)


def _attend(
    known: _Softmax, q: jax.Array, k: jax.Array, v: jax.Array, at: Places, k_at: Places, spec: AttentionSpec
) -> _Softmax:
    """What queries know, having seen some keys more."""
    scores = _scores(q, k, at, k_at, spec)
    peak = jnp.maximum(known.peak, scores.max(-1))
    weights, rescale = jnp.exp(scores - peak[..., None]), jnp.exp(known.peak - peak)
    read = jnp.einsum("rjgqs,rsjv->rjgqv", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return _Softmax(peak, known.total * rescale + weights.sum(-1), known.values * rescale[..., None] + read)


def _scores(q: jax.Array, k: jax.Array, at: Places, k_at: Places, spec: AttentionSpec) -> Float32[Array, "R J G q s"]:
    R, N, H, K = q.shape
    J = k.shape[2]
    scores = jnp.einsum("rqjgk,rsjk->rjgqs", q.reshape(R, N, J, H // J, K), k, preferred_element_type=jnp.float32)
    mask = scores_mask(at.positions[:, :, None], k_at.positions[:, None, :], spec.reach)
    mask &= at.segments[:, :, None] == k_at.segments[:, None, :]
    return jnp.where(mask[:, None, None], soft_cap(scores * spec.scale, spec.softcap), NEG_INF)


def _backward(spec: AttentionSpec, ring: Ring, saved: Any, to_o: jax.Array) -> tuple[Any, ...]:
    q, k, v, sinks, places, o, lse = saved
    (R, N, H, _), (J, V) = q.shape, v.shape[2:]

    def by_query(x: jax.Array) -> Float[Array, "R J G N V"]:
        return jnp.moveaxis(x.reshape(R, N, J, H // J, V), 1, 3)

    to_o = by_query(to_o)
    shared = (to_o.astype(jnp.float32) * by_query(o)).sum(-1)
    queries = _Queries(q, places, to_o, lse, shared)
    to_q, to_k, to_v = _pull(queries, k, v, places, spec)

    def step(carry: Any, i: jax.Array) -> tuple[Any, None]:
        to_q, (given, passing) = carry[0], _pass_on(carry[1:], ring)

        def earlier(to_q: jax.Array, given: Any, passing: Any) -> Any:
            (to_k, to_v), (k, v, at) = given, passing
            k, v, at = _half(0, (k, v, at))
            more_q, more_k, more_v = _pull(queries, k, v, at, spec)
            return to_q + more_q, (to_k.at[:, : N // 2].add(more_k), to_v.at[:, : N // 2].add(more_v))

        def later(to_q: jax.Array, given: Any, passing: Any) -> Any:
            (to_k, to_v), (k, v, at) = given, passing
            second = _Queries(*_half(1, (q, places)), *_half(1, tuple(queries[2:]), dim=3))
            more_q, more_k, more_v = _pull(second, k, v, at, spec)
            return to_q.at[:, N // 2 :].add(more_q), (to_k + more_k, to_v + more_v)

        return (*jax.lax.cond(_is_earlier(i, ring), earlier, later, to_q, given, passing), passing), None

    (to_q, given, _), _ = jax.lax.scan(step, (to_q, (to_k, to_v), (k, v, places)), jnp.arange(1, ring.size))
    to_k, to_v = _pass_on(given, ring)  # home
    to_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(jnp.float32).reshape(1, J, H // J, 1) - lse)
        to_sinks = -(share * shared).sum((0, 3)).reshape(H).astype(sinks.dtype)
    return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype), to_sinks, None


def _pull(
    queries: _Queries, k: jax.Array, v: jax.Array, k_at: Places, spec: AttentionSpec
) -> tuple[Float32[Array, "R q H K"], Float32[Array, "R s J K"], Float32[Array, "R s J V"]]:
    """The gradients of some queries, keys and values through their scores, which are computed again."""
    q, at, to_o, lse, shared = queries
    scores, pull = jax.vjp(lambda q, k: _scores(q, k, at, k_at, spec), q, k)
    weights = jnp.exp(scores - lse[..., None])
    to_v = jnp.einsum("rjgqs,rjgqv->rsjv", weights.astype(v.dtype), to_o, preferred_element_type=jnp.float32)
    to_weights = jnp.einsum("rjgqv,rsjv->rjgqs", to_o, v, preferred_element_type=jnp.float32)
    to_q, to_k = pull(weights * (to_weights - shared[..., None]))
    return to_q.astype(jnp.float32), to_k.astype(jnp.float32), to_v


ring_attention.defvjp(_forward, _backward)


def _half(i: int, tree: Any, *, dim: int = 1) -> Any:
    """The first or the second half of each array's tokens, which are in this dim."""
    return jax.tree.map(lambda x: jnp.split(x, 2, axis=dim)[i], tree)


def _is_earlier(i: jax.Array, ring: Ring) -> jax.Array:
    """Whether what came i devices far is from one with an earlier first chunk than this device's."""
    return jax.lax.axis_index(ring.axis) >= i


def _pass_on(tree: Any, ring: Ring) -> Any:
    """Each device's arrays to the next one in the ring."""
    if ring.alone:  # a permutation waits for every device of the mesh; what is gathered, for those of the ring
        before = (jax.lax.axis_index(ring.axis) - 1) % ring.size
        return jax.tree.map(lambda x: jax.lax.all_gather(x, ring.axis)[before], tree)
    onward = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, onward), tree)
