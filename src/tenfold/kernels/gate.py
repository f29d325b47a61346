"""Gates of feed-forwards.

Dims: B any leading dims, F feed-forward width.
"""

import functools

import jax
from jaxtyping import Array, Float

from tenfold.kernels import native

_gelu = functools.partial(jax.nn.gelu, approximate=True)
FUNCTIONS = {"silu": jax.nn.silu, "swish": jax.nn.silu, "gelu_new": _gelu, "gelu_pytorch_tanh": _gelu}
"""What a gate may be, as Hugging Face configs call it; both gelus are the one by tanh."""


def reference(gate: Float[Array, "*B F"], up: Float[Array, "*B F"], function: str) -> Float[Array, "*B F"]:
    """The definition, in plain XLA."""
    return FUNCTIONS[function](gate) * up


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def gated(gate: Float[Array, "*B F"], up: Float[Array, "*B F"], function: str) -> Float[Array, "*B F"]:
    """f(gate) ⊙ up, for one of `FUNCTIONS`.

    On a CPU by a native operation, rounded once. XLA would hand the few values of a token to its threads, which takes
    longer than computing them.
    """
    if not native.suits(gate, up):
        return reference(gate, up, function)
    return jax.lax.platform_dependent(
        gate,
        up,
        cpu=functools.partial(_native, function=function),
        default=functools.partial(reference, function=function),
    )


@gated.defjvp
def _(
    function: str, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # Computing it again in the gradient takes less time than keeping it.
    again = jax.checkpoint(functools.partial(reference, function=function), prevent_cse=False)
    return jax.jvp(again, primals, tangents)


def _native(gate: jax.Array, up: jax.Array, *, function: str) -> jax.Array:
    call = jax.ffi.ffi_call("tenfold_gate", jax.ShapeDtypeStruct(gate.shape, gate.dtype), vmap_method="broadcast_all")
    return call(gate, up, silu=FUNCTIONS[function] is jax.nn.silu)
