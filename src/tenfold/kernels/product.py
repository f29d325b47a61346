"""Products of matrices that are trained: plain arrays, of which gradients are products, too.

XLA's products of float32 reach two thirds of what a CPU's cores can add up, and a third for the logits of a vocabulary.
Where a product is differentiated on a single CPU, it and its gradients are the native operation's. What is not
differentiated is left to XLA, and so is what is spread over a mesh, which XLA has to split.

Dims: M rows, K inputs, N outputs; of B products at once.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tenfold.kernels import native


def product(
    x: Float[Array, "M K"], weight: Float[Array, "K N"] | Float[Array, "N K"], dtype: DTypeLike | None = None, *,
    transposed: bool = False,
) -> Float[Array, "M N"]:  # fmt: skip
    """x · weight, or where it is transposed x · weightᵀ.

    Args:
        x, weight: of one dtype.
        dtype: of the result; x's by default. Sums are not rounded to a narrower one before.
        transposed: whether the weight has a row for each output.
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if _suits_native(x, weight, dtype):
        return _differentiable(x, weight, transposed)
    weight = weight.T if transposed else weight
    return jnp.matmul(x, weight) if dtype == x.dtype else _wide_product(x, weight, dtype)


def _suits_native(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> bool:
    return x.dtype == weight.dtype == dtype == jnp.float32 and native.serves_alone()


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _wide_product(x: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A product whose sums are not rounded to the dtype of its factors. Gradients are products of that dtype, too:
    by itself JAX would multiply in the wider one, several times slower where matrix units are."""
    return jnp.matmul(x, weight, preferred_element_type=dtype)


@_wide_product.defjvp
def _(dtype: jnp.dtype, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, weight), (to_x, to_weight) = primals, tangents
    moved = jnp.matmul(to_x, weight) + jnp.matmul(x, to_weight)
    return _wide_product(x, weight, dtype), moved.astype(dtype)


# --- the native product ----------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _differentiable(x: jax.Array, weight: jax.Array, transposed: bool) -> jax.Array:
    return jnp.matmul(x, weight.T if transposed else weight)


@functools.partial(_differentiable.defjvp, symbolic_zeros=True)
def _(transposed: bool, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x, weight), (to_x, to_weight) = primals, tangents
    factors = ((to_x, weight), (x, to_weight))
    moved = [multiply(a, b, b_transposed=transposed) for a, b in factors if SymbolicZero not in (type(a), type(b))]
    result = multiply(x, weight, b_transposed=transposed)
    return result, sum(moved[1:], moved[0]) if moved else SymbolicZero(jax.typeof(result))


product_p = Primitive("tenfold_product")
"""A product of two matrices, either of which may be transposed; linear in each."""


def multiply(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], *, a_transposed: bool = False, b_transposed: bool = False
) -> Float[Array, "M N"]:
    """The product of two float32 matrices by the native operation, on a CPU; by XLA's elsewhere.

    Every result is a sum in one order, whatever the number of rows, columns and threads.
    """
    return product_p.bind(a, b, a_transposed=a_transposed, b_transposed=b_transposed)


def reference(
    a: Float[Array, "*B _ _"], b: Float[Array, "*B _ _"], *, a_transposed: bool, b_transposed: bool
) -> Float[Array, "*B M N"]:
    """The definition, in plain XLA; also of several products."""
    batch = tuple(range(a.ndim - 2))
    contracted = ((a.ndim - (2 if a_transposed else 1),), (b.ndim - (1 if b_transposed else 2),))
    return jax.lax.dot_general(a, b, (contracted, (batch, batch)))


def _native(a: jax.Array, b: jax.Array, *, a_transposed: bool, b_transposed: bool) -> jax.Array:
    dims = a.shape[1 if a_transposed else 0], b.shape[0 if b_transposed else 1]
    call = jax.ffi.ffi_call("tenfold_product", jax.ShapeDtypeStruct(dims, a.dtype))
    return call(a, b, a_transposed=a_transposed, b_transposed=b_transposed)


def _transpose_a(ct: Any, a: Any, b: Any, *, a_transposed: bool, b_transposed: bool) -> jax.Array:
    del a
    if a_transposed:
        return multiply(b, ct, a_transposed=b_transposed, b_transposed=True)
    return multiply(ct, b, b_transposed=not b_transposed)


def _transpose_b(ct: Any, a: Any, b: Any, *, a_transposed: bool, b_transposed: bool) -> jax.Array:
    del b
    if b_transposed:
        return multiply(ct, a, a_transposed=True, b_transposed=a_transposed)
    return multiply(a, ct, a_transposed=not a_transposed)


def _batch(arrays: Any, dims: Any, *, a_transposed: bool, b_transposed: bool) -> tuple[jax.Array, int]:
    (a, b), (of_a, of_b) = arrays, dims
    if of_b is None and not a_transposed:  # rows are rows
        a = jnp.moveaxis(a, of_a, 0)
        rows = multiply(a.reshape(-1, a.shape[-1]), b, b_transposed=b_transposed)
        return rows.reshape(*a.shape[:2], -1), 0
    size = next(x.shape[dim] for x, dim in zip(arrays, dims, strict=True) if dim is not None)
    a, b = (batching.bdim_at_front(x, dim, size) for x, dim in zip(arrays, dims, strict=True))
    return reference(a, b, a_transposed=a_transposed, b_transposed=b_transposed), 0


def _shape(a: Any, b: Any, *, a_transposed: bool, b_transposed: bool) -> Any:
    return a.update(shape=(a.shape[1 if a_transposed else 0], b.shape[0 if b_transposed else 1]))


product_p.def_impl(jax.jit(multiply, static_argnames=("a_transposed", "b_transposed")))
product_p.def_abstract_eval(_shape)
ad.defbilinear(product_p, _transpose_a, _transpose_b)
batching.primitive_batchers[product_p] = _batch
mlir.register_lowering(product_p, mlir.lower_fun(reference, multiple_results=False))
mlir.register_lowering(product_p, mlir.lower_fun(_native, multiple_results=False), platform="cpu")
