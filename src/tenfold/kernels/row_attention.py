"""Attention within packed rows by native operations, and its gradient: what training on a CPU mixes tokens with.

The scores of a block of queries stay in a cache, and the gradient computes them again, so that a layer keeps nothing
whose size grows with the square of a row. `packed_attention` defines the result, and is what other derivatives are of.

Dims: R rows of L tokens, H query heads, J key-value heads, K head dim.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int

from tenfold.kernels import native
from tenfold.kernels.attention import AttentionSpec, packed_attention


def row_attention(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L J K"],
    v: Float[Array, "R L J K"],
    segments: Int[Array, "R L"],
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "R L H K"]:
    """As `packed_attention`, to which it leaves what the native operation does not do."""
    if not _suits_native(q, k, v, spec) or sinks is not None:
        return packed_attention(q, k, v, segments, spec, sinks)
    return forward_p.bind(q, k, v, segments.astype(jnp.int32), spec=spec)[0]


def _suits_native(q: jax.Array, k: jax.Array, v: jax.Array, spec: AttentionSpec) -> bool:
    is_float32 = q.dtype == k.dtype == v.dtype == jnp.float32 and q.shape[3] == v.shape[3]
    plain = spec.softcap is None and spec.chunk is None
    return is_float32 and plain and native.serves_alone()


forward_p = Primitive("tenfold_row_attention")
"""(q, k, v, segments) -> what is read, and of each query the logarithm of the sum of its weights' exponentials, which
only the gradient reads."""
forward_p.multiple_results = True

tangent_p = Primitive("tenfold_row_attention_tangent")
"""(q, k, v, segments, what forward_p gives, and how q, k and v move) -> how what is read moves; linear in the last."""

gradient_p = Primitive("tenfold_row_attention_gradient")
"""The transpose of `tangent_p`: in place of how q, k and v move, the gradient of what is read."""
gradient_p.multiple_results = True


# --- definitions -----------------------------------------------------------------------------------------------------


def _reference(segments: jax.Array, spec: AttentionSpec, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return packed_attention(q, k, v, segments, spec)


def _reference_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, spec: AttentionSpec
) -> list[jax.Array]:
    R, L, H, _ = q.shape
    return [_reference(segments, spec, q, k, v), jnp.zeros((R, H, L), q.dtype)]  # whose gradient needs no logarithms


def _reference_tangent(*arrays: jax.Array, spec: AttentionSpec) -> jax.Array:
    q, k, v, segments, _, _, *moves = arrays
    return jax.jvp(partial(_reference, segments, spec), (q, k, v), tuple(moves))[1]


def _reference_gradient(*arrays: jax.Array, spec: AttentionSpec) -> list[jax.Array]:
    q, k, v, segments, _, _, ct = arrays
    return list(jax.vjp(partial(_reference, segments, spec), q, k, v)[1](ct))


def _native_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, spec: AttentionSpec
) -> Sequence[jax.Array]:
    R, L, H, _ = q.shape
    results = [jax.ShapeDtypeStruct(shape, q.dtype) for shape in (q.shape, (R, H, L))]
    return jax.ffi.ffi_call("tenfold_row_attention", results)(q, k, v, segments, **_attributes(spec))


def _native_gradient(*arrays: jax.Array, spec: AttentionSpec) -> Sequence[jax.Array]:
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:3]]
    return jax.ffi.ffi_call("tenfold_row_attention_gradient", results)(*arrays, **_attributes(spec))


def _attributes(spec: AttentionSpec) -> dict[str, Any]:
    return {"scale": np.float32(spec.scale), "window": np.int64(spec.window or 0)}


# --- derivatives -----------------------------------------------------------------------------------------------------


def _move_forward(primals: Any, tangents: Any, *, spec: AttentionSpec) -> tuple[Any, Any]:
    read, sums = forward_p.bind(*primals, spec=spec)
    moves = map(ad.instantiate_zeros, tangents[:3])
    return (read, sums), (tangent_p.bind(*primals, read, sums, *moves, spec=spec), jnp.zeros_like(sums))


def _transpose_tangent(ct: Any, *arrays: Any, spec: AttentionSpec) -> list[Any]:
    given = arrays[:6]
    return [None] * 6 + (gradient_p.bind(*given, ct, spec=spec) if type(ct) is not ad.Zero else [None] * 3)


def _move_by_reference(reference: Any, primitive: Primitive, primals: Any, tangents: Any, *, spec: Any) -> Any:
    """Of what is itself a derivative: what `forward_p` gave moves with q, k and v, and so is not followed."""
    follow = [i for i in range(len(primals)) if i not in (3, 4, 5)]

    def function(*followed: jax.Array) -> Any:
        return reference(*followed[:3], *primals[3:6], *followed[3:], spec=spec)

    moves = tuple(ad.instantiate_zeros(tangents[i]) for i in follow)
    moved = jax.jvp(function, tuple(primals[i] for i in follow), moves)[1]
    return primitive.bind(*primals, spec=spec), moved


def _batch(primitive: Primitive, arrays: Any, dims: Any, *, spec: AttentionSpec) -> tuple[Any, Any]:
    """Rows of several batches are rows."""
    size = next(x.shape[dim] for x, dim in zip(arrays, dims, strict=True) if dim is not None)
    each = (batching.bdim_at_front(x, dim, size) for x, dim in zip(arrays, dims, strict=True))
    results = primitive.bind(*(x.reshape(-1, *x.shape[2:]) for x in each), spec=spec)
    if not primitive.multiple_results:
        return results.reshape(size, -1, *results.shape[1:]), 0
    return [x.reshape(size, -1, *x.shape[1:]) for x in results], [0] * len(results)


def _register(primitive: Primitive, reference: Any, fast: Any) -> None:
    many = primitive.multiple_results

    def shapes(*arrays: Any, spec: AttentionSpec) -> Any:
        found = jax.eval_shape(partial(reference, spec=spec), *arrays)
        return jax.tree.map(lambda s: arrays[0].update(shape=s.shape), found)

    primitive.def_impl(jax.jit(primitive.bind, static_argnames="spec"))
    primitive.def_abstract_eval(shapes)
    batching.primitive_batchers[primitive] = partial(_batch, primitive)
    mlir.register_lowering(primitive, mlir.lower_fun(reference, multiple_results=many))
    mlir.register_lowering(primitive, mlir.lower_fun(fast, multiple_results=many), platform="cpu")


_register(forward_p, _reference_forward, _native_forward)
_register(tangent_p, _reference_tangent, _reference_tangent)
_register(gradient_p, _reference_gradient, _native_gradient)
ad.primitive_jvps[forward_p] = _move_forward
ad.primitive_jvps[tangent_p] = partial(_move_by_reference, _reference_tangent, tangent_p)
ad.primitive_jvps[gradient_p] = partial(_move_by_reference, _reference_gradient, gradient_p)
ad.primitive_transposes[tangent_p] = _transpose_tangent
