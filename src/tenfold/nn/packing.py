"""Repacking loaded weights for the native operations of a CPU."""

import jax

from tenfold.kernels import matmul
from tenfold.kernels.matmul import QuantizedWeight, Weight
from tenfold.nn.param import Param

PACKED_DTYPES = ("float32", "bfloat16")


def pack(p: Param, weight: jax.Array | QuantizedWeight) -> Weight:
    """A weight as the native operations want it: in panels, if products use it and have its format; else as it is."""
    pack_one = matmul.pack if p.experts is None else matmul.pack_experts
    if isinstance(weight, QuantizedWeight):
        return pack_one(weight, p.output_dims) if matmul.packs(weight) else weight
    if not p.inputs or p.stacked or weight.dtype.name not in PACKED_DTYPES:
        return weight
    return pack_one(p.as_matrix(weight), p.output_dims)
