"""What mixes tokens when whole sequences lie packed in rows: training, and the references of tests.

Dims: R rows, L tokens of a row; T = R · L.
"""

from typing import Any

import jax
from jaxtyping import Array, Int

from tenfold.kernels.attention import Attend, AttentionSpec, Heads, packed_attention


def packed_attend(segments: Int[Array, "R L"]) -> Attend:
    """An `Attend` for T tokens that are R rows end to end: causal, and within each segment of a row.

    What it returns as a layer's cache are the keys and values, for layers that read them.

    Args:
        segments: an id per token; tokens see only tokens of the same id in the same row.
    """
    R, L = segments.shape

    def attend(heads: Heads, cache: Any, spec: AttentionSpec) -> tuple[jax.Array, Any]:
        if heads.k is not None and heads.v is not None:
            cache = heads.k, heads.v
        q, k, v = (x.reshape(R, L, *x.shape[1:]) for x in (heads.q, *cache))
        o = packed_attention(q, k, v, segments, spec)
        return o.reshape(R * L, *o.shape[2:]), cache

    return attend
