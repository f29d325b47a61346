"""What mixes tokens when whole sequences lie packed in rows: training, and the references of tests.

Dims: R rows, L tokens of a row; T = R · L.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tenfold.kernels import convolution, latent_attention, recurrence
from tenfold.kernels.attention import Attend, AttentionSpec, Heads, packed_attention
from tenfold.kernels.convolution import ConvolutionSpec
from tenfold.kernels.latent_attention import LatentSpec
from tenfold.kernels.recurrence import RecurrenceSpec


def packed_attend(segments: Int[Array, "R L"]) -> Attend:
    """An `Attend` for T tokens that are R rows end to end: causal, and within each segment of a row.

    What it returns as a layer's cache are the keys and values, for layers that read them.

    Args:
        segments: an id per token; tokens see only tokens of the same id in the same row.
    """
    R, L = segments.shape

    def attend(inputs: Any, cache: Any, spec: Any) -> tuple[jax.Array, Any]:
        match spec:
            case ConvolutionSpec():
                return convolution.reference(inputs, segments), cache
            case LatentSpec():
                return latent_attention.reference(inputs, segments, spec), cache
            case RecurrenceSpec():
                fresh = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
                return recurrence.reference(inputs, fresh)[0], cache
            case _:
                return attend_heads(inputs, cache, spec)

    def attend_heads(heads: Heads, cache: Any, spec: AttentionSpec) -> tuple[jax.Array, Any]:
        if heads.k is not None and heads.v is not None:
            cache = heads.k, heads.v
        q, k, v = (x.reshape(R, L, *x.shape[1:]) for x in (heads.q, *cache))
        o = packed_attention(q, k, v, segments, spec, heads.sinks)
        return o.reshape(R * L, *o.shape[2:]), cache

    return attend
