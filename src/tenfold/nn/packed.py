"""What mixes tokens when whole sequences lie packed in rows: training, and the references of tests.

Where rows are shared out over the devices of a context, attention goes round them. Recurrences and convolutions gather
their rows first: each device computes them whole.

Dims: R rows, L tokens of a row; T = R · L.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tenfold.kernels import convolution, latent_attention, recurrence
from tenfold.kernels.attention import Attend, AttentionSpec, Heads, on_gpu, segment_starts
from tenfold.kernels.convolution import ConvolutionSpec
from tenfold.kernels.flash_attention import flash_attention
from tenfold.kernels.latent_attention import Latents, LatentSpec
from tenfold.kernels.recurrence import RecurrenceSpec
from tenfold.kernels.ring_attention import Places, Ring, ring_attention
from tenfold.kernels.row_attention import row_attention
from tenfold.parallel.layout import NOWHERE, Layout, current


def packed_attend(segments: Int[Array, "R L"], layout: Layout = NOWHERE) -> Attend:
    """An `Attend` for T tokens that are R rows end to end: causal, and within each segment of a row.

    What it returns as a layer's cache are the keys and values, for layers that read them.

    Args:
        segments: an id per token; tokens see only tokens of the same id in the same row.
        layout: which flattened the rows, and says where tokens lie.
    """
    R, L = segments.shape

    def attend(inputs: Any, cache: Any, spec: Any) -> tuple[jax.Array, Any]:
        match spec:
            case ConvolutionSpec():
                gathered = inputs._replace(x=gather(inputs.x))
                return share_out(convolution.reference(gathered, segments)), cache
            case LatentSpec():
                return attend_latents(inputs, spec), cache
            case RecurrenceSpec():
                fresh = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
                return share_out(recurrence.reference(jax.tree.map(gather, inputs), fresh)[0]), cache
            case _:
                return attend_heads(inputs, cache, spec)

    def attend_heads(heads: Heads, cache: Any, spec: AttentionSpec) -> tuple[jax.Array, Any]:
        if heads.k is not None and heads.v is not None:
            cache = heads.k, heads.v
        if layout.context > 1:
            return _attend_ring(heads.q, cache[0], cache[1], heads.sinks, segments, spec, layout), cache
        q, k, v = (x.reshape(R, L, *x.shape[1:]) for x in (heads.q, *cache))
        mix = partial(attend_tiles, layout=layout) if on_gpu() else row_attention
        o = mix(q, k, v, segments, spec, heads.sinks)
        return o.reshape(R * L, *o.shape[2:]), cache

    def attend_latents(inputs: Latents, spec: LatentSpec) -> jax.Array:
        if layout.context == 1:
            return latent_attention.reference(inputs, segments, spec)
        # Queries go to the latents, so that these go round, which are smaller than the keys and values of all heads.
        q = jnp.concatenate([jnp.einsum("thk,hkr->thr", inputs.q, inputs.to_keys), inputs.q_rotated], axis=-1)
        k = jnp.concatenate([inputs.latent, inputs.k_rotated], axis=-1)[:, None]
        read = _attend_ring(q, k, inputs.latent[:, None], None, segments, AttentionSpec(spec.scale), layout)
        return jnp.einsum("thr,hvr->thv", read, inputs.to_values)

    def gather(x: jax.Array) -> jax.Array:
        """Flat tokens, with those of a row end to end."""
        return x if layout.context == 1 else layout.unflatten(x, R).reshape(R * L, *x.shape[1:])

    def share_out(x: jax.Array) -> jax.Array:
        """The inverse of `gather`."""
        return x if layout.context == 1 else layout.flatten(x.reshape(R, L, *x.shape[1:]))

    return attend


def attend_tiles(
    q: Float[Array, "R L H K"],
    k: Float[Array, "R L J K"],
    v: Float[Array, "R L J K"],
    segments: Int[Array, "R L"],
    spec: AttentionSpec,
    sinks: Float[Array, " H"] | None = None,
    *,
    layout: Layout,
    interpret: bool = False,
) -> Float[Array, "R L H K"]:
    """`flash_attention` of the rows and heads that each device has, which the compiler cannot share out by itself.

    Arguments as there, and the layout. Heads are whole on every device if those of keys do not divide over "tensor".
    """
    attend = partial(flash_attention, spec=spec, interpret=interpret)
    if layout.mesh is None:
        return attend(q, k, v, segments, sinks=sinks)
    tensor = "tensor" if k.shape[2] % layout.size("tensor") == 0 and "tensor" in layout.mesh.shape else None
    rows, heads = PartitionSpec(layout.row_axes, None, tensor), PartitionSpec(tensor)
    return jax.shard_map(
        lambda q, k, v, segments, sinks: attend(q, k, v, segments, sinks=sinks),
        mesh=current(layout.mesh),
        in_specs=(rows, rows, rows, PartitionSpec(layout.row_axes), heads),
        out_specs=rows,
        axis_names={*layout.row_axes, *([tensor] if tensor else [])},
        check_vma=False,  # as in `_attend_ring`
    )(q, k, v, segments, sinks)


def _attend_ring(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    segments: Int[Array, "R L"],
    spec: AttentionSpec,
    layout: Layout,
) -> jax.Array:
    """Attention of flat tokens that are shared out over the devices of a context."""
    assert layout.mesh is not None
    R, L = segments.shape
    positions = jnp.broadcast_to(jnp.arange(L, dtype=segments.dtype), segments.shape)
    if spec.chunk is not None:  # chunks are counted from where a segment starts
        positions = positions - segment_starts(segments)
    places = Places(layout.flatten(positions), layout.flatten(segments))

    ring = Ring("context", layout.context, alone=layout.size("pipeline") > 1)

    def attend(shares: Any, sinks: jax.Array | None) -> jax.Array:
        q, k, v, places = jax.tree.map(lambda x: x[0], shares)
        o: jax.Array = ring_attention(q, k, v, sinks, places, spec, ring)
        return o[None]

    split, whole = PartitionSpec("context"), PartitionSpec()
    go_round = jax.shard_map(
        attend,
        mesh=current(layout.mesh),
        in_specs=(split, whole),
        out_specs=split,
        axis_names={"context"},
        check_vma=False,  # kernels start their loops with constants, which vary over no axis
    )
    o = go_round(jax.tree.map(lambda x: layout.shares(x, R), (q, k, v, places)), sinks)
    return o.reshape(R * L, *o.shape[3:])
