"""Products of activations with weights, whatever format the weights are in.

A weight is a plain matrix, a `QuantizedWeight`, or, on a CPU with the native operations, a `PackedWeight`: either of
them, repacked once into the panels that the native loops read from first to last. An `AdaptedWeight` adds what is
trained of a weight to one of them that is not. A `Float8Weight` is multiplied in 8-bit floats. `reference` defines the
result.

The native products of quantised weights round the activations to 8 bits too, in groups of at most 128 inputs, which is
off by at most 1/254 of the group's largest. All others compute with the activations as they are.

Dims: M rows of activations, D inputs, N outputs, P panels of 32 outputs, G groups of inputs that share a scale, r rank
of an adapter.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from tenfold.kernels import float8, native
from tenfold.kernels.product import product

PANEL = 32  # outputs of a panel; as in src/native/kernels.h
TOGETHER = {32: 1, 16: 2, 8: 4, 4: 8}  # inputs that stand together in a panel, by the bits of a weight
MAX_SHARED = 128  # inputs whose activations share a scale, at most


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "mins"],
    meta_fields=["bits", "zero", "dims", "floats"],
)
@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """weight = scale · (code - zero), or scale · code - min where there are mins.

    Of several experts, all arrays have a leading dim E, and so have the results of the methods.

    Attributes:
        codes: uint8 [D, N]; of 4 bits, [D / 2, N] with the even input in the low half of a byte.
        scales: float32 [G, N]; D / G inputs share one.
        mins: float32 [G, N], or None.
        bits: 8 or 4.
        zero: the code of 0 where there are no mins.
        dims: the output dims, whose product is N.
        floats: the codes are floats of 8 bits (e4m3), as the bytes that they are, and `zero` is 0.
    """

    codes: Any  # not always arrays: jax also puts shapes and shardings into these places
    scales: Any
    mins: Any = None
    bits: int
    zero: int
    dims: tuple[int, ...]
    floats: bool = False

    @property
    def inputs(self) -> int:
        return self.codes.shape[-2] * 8 // self.bits

    @property
    def group(self) -> int:
        return self.inputs // self.scales.shape[-2]

    def unpacked(self) -> UInt8[Array, "*E D N"]:
        """The codes, one per byte."""
        if self.bits == 8:
            return self.codes
        *leading, _, N = self.codes.shape
        return jnp.stack([self.codes & 15, self.codes >> 4], axis=-2).reshape(*leading, self.inputs, N)

    def dequantize(self, dtype: DTypeLike) -> Float[Array, "*E D N"]:
        """The weights as numbers."""
        *leading, _, N = self.codes.shape
        codes = self.unpacked()
        codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn) if self.floats else codes
        codes = codes.astype(jnp.float32).reshape(*leading, -1, self.group, N)
        if self.mins is None:
            values = (codes - self.zero) * self.scales[..., None, :]
        else:
            values = codes * self.scales[..., None, :] - self.mins[..., None, :]
        return values.reshape(*leading, self.inputs, N).astype(dtype)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scales", "mins"],
    meta_fields=["bits", "inputs", "group", "zero", "dims"],
)
@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight in the panels of the native operations; see src/native/kernels.h for what stands where.

    Of several experts, all arrays have a leading dim E.

    Attributes:
        data: [P, D / k, 32, k], with k inputs together (for 4 bits two of them in a byte).
        scales, mins: float32 [P, G, 32], or None.
        bits: of a weight; 32 and 16 are float32 and bfloat16.
        inputs: D, without padding.
        group: inputs that share a scale; 0 without scales.
        zero: as in `QuantizedWeight`.
        dims: the output dims, whose product is N.
    """

    data: Any
    scales: Any = None
    mins: Any = None
    bits: int
    inputs: int
    group: int = 0
    zero: int = 0
    dims: tuple[int, ...]

    @property
    def format(self) -> tuple[int, int, int, bool]:
        """What weights must share to be multiplied in one call."""
        return self.bits, self.group, self.zero, self.mins is not None


@dataclass(frozen=True, kw_only=True)
class ObservedWeight:
    """A weight whose products a function makes, which so sees the activations: what calibration is done with.

    It holds no arrays and cannot be passed to a program: run what uses it under `jax.disable_jit`.

    Attributes:
        product: [M, D] -> [M, N].
        dims: the output dims, whose product is N.
    """

    product: Callable[[jax.Array], jax.Array]
    dims: tuple[int, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=[])
@dataclass(frozen=True)
class Float8Weight:
    """A plain weight whose products, and their gradients, are those of `float8.products`.

    Attributes:
        array: [D, O...], as it is trained: rounded by every product anew.
    """

    array: Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "magnitude", "key"],
    meta_fields=["scale", "dropout"],
)
@dataclass(frozen=True, kw_only=True)
class AdaptedWeight:
    """weight = base + scale · a · b (LoRA: Hu et al., 2021), whose outputs may each be given a length of their own
    (DoRA: Liu et al., 2024).

    Gradients flow to a, b and the magnitude, and through products to the activations. The lengths that the magnitude
    replaces are constants to them (section 4.3 of DoRA).

    Attributes:
        base: an array [D, O...] or a weight of another kind; only products are made with it.
        a: [D..., r], whose leading dims are those of the inputs.
        b: [r, O...], whose trailing dims are those of the outputs.
        magnitude: [O...], or None.
        scale: of what is added.
        dropout: the share of the inputs that what is trained does not see, where there is a key; the others are scaled
            up by as much.
        key: says which; None drops none.
    """

    base: Any
    a: Any
    b: Any
    magnitude: Any = None
    scale: float
    dropout: float = 0.0
    key: Any = None

    def matrices(self, inputs: int, dtype: DTypeLike) -> tuple[Float[Array, "D r"], Float[Array, "r N"]]:
        """a and b as matrices, for so many inputs."""
        a = self.a.reshape(inputs, -1).astype(dtype)
        return a, self.b.reshape(a.shape[1], -1).astype(dtype)

    def factors(self, inputs: int) -> Float[Array, "1 N"]:
        """What the magnitude makes of every output, in float32; needs a base that is no `PackedWeight`."""
        a, b = self.matrices(inputs, jnp.float32)
        base = self.base.array if isinstance(self.base, Float8Weight) else self.base
        base = base.dequantize(jnp.float32) if isinstance(base, QuantizedWeight) else base
        whole = base.reshape(inputs, -1).astype(jnp.float32) + self.scale * jnp.matmul(a, b)
        lengths = jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=0, keepdims=True))
        return self.magnitude.reshape(1, -1).astype(jnp.float32) / lengths


Weight = jax.Array | QuantizedWeight | PackedWeight | ObservedWeight | Float8Weight | AdaptedWeight


def output_dims(weight: Weight, inputs: int) -> tuple[int, ...]:
    """The dims of an output of `weight`, whose leading dims are contracted with `inputs` inputs."""
    if isinstance(weight, AdaptedWeight):
        return output_dims(weight.base, inputs)
    if isinstance(weight, Float8Weight):
        return output_dims(weight.array, inputs)
    if not isinstance(weight, jax.Array):
        return weight.dims
    leading = next(i for i in range(1, weight.ndim) if math.prod(weight.shape[:i]) == inputs)
    return weight.shape[leading:]


def reference(x: Float[Array, "M D"], weight: Weight, dtype: DTypeLike | None = None) -> Float[Array, "M N"]:
    """The definition, in plain XLA: of any weight but a packed one."""
    if isinstance(weight, ObservedWeight):
        return weight.product(x)
    if isinstance(weight, Float8Weight):
        return _float8_products(x, [weight], dtype)[0]
    if isinstance(weight, AdaptedWeight):
        return _adapted_product(x, weight, dtype)
    assert not isinstance(weight, PackedWeight), "packed weights are for native products only"
    if isinstance(weight, QuantizedWeight):
        weight = weight.dequantize(x.dtype)
    return product(x, weight.reshape(x.shape[1], -1), dtype)


def _adapted_product(x: jax.Array, weight: AdaptedWeight, dtype: DTypeLike | None) -> jax.Array:
    (y,) = matmul(x, weight.base, dtype=dtype)
    a, b = weight.matrices(x.shape[1], x.dtype)
    seen = x if weight.key is None else _dropped(x, weight.key, weight.dropout)
    added = weight.scale * jnp.matmul(jnp.matmul(seen, a), b).astype(y.dtype)
    if weight.magnitude is None:
        return y + added
    factors = weight.factors(x.shape[1]).astype(y.dtype)
    if weight.key is None:
        return (y + added) * factors
    (of_seen,) = matmul(seen, weight.base, dtype=dtype)  # what is trained of an output is all of its length, as in PEFT
    return y + (factors - 1) * of_seen + factors * added


def _dropped(x: jax.Array, key: jax.Array, share: float) -> jax.Array:
    """x with a share of its numbers zero, and the others as much larger (Srivastava et al., 2014)."""
    return jnp.where(jax.random.bernoulli(key, 1 - share, x.shape), x / (1 - share), 0).astype(x.dtype)


def _float8_products(x: jax.Array, weights: Sequence[Float8Weight], dtype: DTypeLike | None) -> tuple[jax.Array, ...]:
    return float8.products(x, *(w.array.reshape(x.shape[1], -1) for w in weights), dtype=dtype or x.dtype)


def matmul(x: Float[Array, "M D"], *weights: Weight, dtype: DTypeLike | None = None) -> tuple[Float[Array, "M _"], ...]:
    """x · w for each weight; together, because one call over several costs little more than over one.

    Args:
        x: activations, float32 or bfloat16.
        weights: of D inputs each.
        dtype: of the results; x's by default.
    """
    results: list[jax.Array] = []
    for kind, group in itertools.groupby(weights, lambda w: w.format if isinstance(w, PackedWeight) else type(w)):
        alike: Any = list(group)
        if isinstance(kind, tuple):
            results += native_products(x, alike, jnp.dtype(dtype or x.dtype))
        elif kind is Float8Weight:
            results += _float8_products(x, alike, dtype)
        else:
            results += [reference(x, w, dtype) for w in alike]
    return tuple(results)


def native_products(
    x: Float[Array, "M D"],
    weights: Sequence[PackedWeight],
    dtype: jnp.dtype,
    group_sizes: Int[Array, " E"] | None = None,
) -> Sequence[jax.Array]:
    """x · w for weights of one format, by the native operations; of groups of rows and a weight of each, where there
    are group sizes."""
    assert native.library(), "packed weights need the native operations"
    name, sizes = ("tenfold_matmul", ()) if group_sizes is None else ("tenfold_grouped_matmul", (group_sizes,))
    outputs = [jax.ShapeDtypeStruct((x.shape[0], math.prod(w.dims)), dtype) for w in weights]
    arrays = [array for w in weights for array in (w.data, w.scales, w.mins) if array is not None]
    first = weights[0]
    if first.scales is None:
        return jax.ffi.ffi_call(name, outputs)(x, *sizes, *arrays)
    return jax.ffi.ffi_call(f"{name}_quantized", outputs)(
        x,
        *sizes,
        *arrays,
        bits=np.int64(first.bits),
        group=np.int64(first.group),
        zero=np.int64(first.zero),
        affine=first.mins is not None,
    )


def packs(weight: QuantizedWeight) -> bool:
    """Whether the native operations have its codes, which are no floats, and its groups: of a multiple of 8 inputs, and
    above 128 of 128."""
    if weight.floats:
        return False
    return weight.scales.shape[-2] == 1 or weight.group % (8 if weight.group <= MAX_SHARED else MAX_SHARED) == 0


def pack(weight: jax.Array | QuantizedWeight, dims: tuple[int, ...] | None = None) -> PackedWeight:
    """Repacks a weight for the native operations.

    Args:
        weight: float32 or bfloat16 [D, N], or a quantised weight that `packs`.
        dims: the output dims of a plain matrix; (N,) by default.
    """
    if isinstance(weight, QuantizedWeight):
        return _pack_quantized(weight)
    bits = weight.dtype.itemsize * 8
    data = _panels(weight, TOGETHER[bits], 1)
    return PackedWeight(data=data, bits=bits, inputs=weight.shape[0], dims=dims or (weight.shape[1],))


def pack_experts(weight: jax.Array | QuantizedWeight, dims: tuple[int, ...]) -> PackedWeight:
    """Repacks a weight of each expert, [E, D, N]; as `pack`."""
    return jax.vmap(functools.partial(pack, dims=dims))(weight)


@jax.jit
def _pack_quantized(w: QuantizedWeight) -> PackedWeight:
    whole = len(w.scales) == 1  # one scale for all inputs: a group of any length, padded
    group = -(-w.inputs // MAX_SHARED) * MAX_SHARED if whole else w.group
    data = _panels(w.unpacked(), TOGETHER[w.bits], min(group, MAX_SHARED))  # the padding meets activations of 0
    if w.bits == 4:
        data = data[..., :4] | (data[..., 4:] << 4)
    scales = _columns(w.scales)
    mins = None if w.mins is None else _columns(w.mins)
    return PackedWeight(
        data=data, scales=scales, mins=mins, bits=w.bits, inputs=w.inputs, group=group, zero=w.zero, dims=w.dims
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _panels(matrix: jax.Array, together: int, multiple: int) -> jax.Array:
    """[D, N] as [P, D / k, 32, k], padded with zeros to a multiple of k and `multiple` inputs."""
    D, N = matrix.shape
    padded = jnp.pad(matrix, ((0, -D % max(together, multiple)), (0, -N % PANEL)))
    return padded.reshape(-1, together, -(-N // PANEL), PANEL).transpose(2, 0, 3, 1)


def _columns(groups: Float[Array, "G N"]) -> Float[Array, "P G 32"]:
    G, N = groups.shape
    return jnp.pad(groups, ((0, 0), (0, -N % PANEL))).reshape(G, -1, PANEL).transpose(1, 0, 2)


def lookup(weight: Weight, columns: Int[Array, " T"], dtype: DTypeLike) -> Float[Array, "T D"]:
    """The weights of single outputs: what an embedding that also serves as the last product is asked for."""
    assert not isinstance(weight, ObservedWeight | Float8Weight | AdaptedWeight), "such a weight has products only"
    if isinstance(weight, QuantizedWeight):
        rows = replace(weight, codes=weight.codes[:, columns], scales=weight.scales[:, columns],
                       mins=None if weight.mins is None else weight.mins[:, columns])  # fmt: skip
        return rows.dequantize(dtype).T
    if not isinstance(weight, PackedWeight):
        return weight[columns].astype(dtype)
    panels, lanes = columns // PANEL, columns % PANEL
    rows = weight.data[panels, :, lanes]  # T, D / k, k
    if weight.scales is None:
        return rows.reshape(len(columns), -1)[:, : weight.inputs].astype(dtype)
    if weight.bits == 4:
        rows = jnp.concatenate([rows & 15, rows >> 4], axis=-1)
    codes = rows.reshape(len(columns), -1)[:, : weight.inputs].astype(jnp.float32)
    groups = jnp.arange(weight.inputs) // weight.group
    scales = weight.scales[panels, :, lanes][:, groups]
    if weight.mins is None:
        return ((codes - weight.zero) * scales).astype(dtype)
    return (codes * scales - weight.mins[panels, :, lanes][:, groups]).astype(dtype)
