"""How the tensors of a checkpoint stand for one weight: as it is, or in one of the formats of quantised checkpoints.

An encoding says which tensors it takes, and makes of them the weight's rows: the integers and scales of formats that
are affine, so that nothing is rounded, or numbers. `tenfold.nn.quantized_checkpoint` finds the encoding of a weight.

Formulas and layouts:
    compressed-tensors: https://github.com/vllm-project/compressed-tensors (`quantization/lifecycle/forward.py`)
    GPTQ: https://github.com/AutoGPTQ/AutoGPTQ (`qlinear_cuda_old.py`); `gptq_v2`: https://github.com/ModelCloud/GPTQModel
    AWQ: https://github.com/casper-hansen/AutoAWQ (`utils/packing_utils.py`)
    fp8 in blocks: DeepSeek-V3 Technical Report, section 3.3 (DeepSeek-AI, 2024)
    MXFP4: OCP Microscaling Formats (MX) Specification 1.0 (2023)

Dims: N outputs (the rows of a weight), D inputs, G groups of inputs that share a scale, W words of packed codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float32, Int, Integer, UInt8

from tenfold.base.affine import Affine, blocks_of, empty_columns, unpack_nibbles
from tenfold.base.errors import CheckpointError
from tenfold.nn.quantization import Grid

Shape = tuple[int, ...]
Tensors = Mapping[str, np.ndarray]

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int32", "int64")
FLOAT8 = "float8_e4m3fn"
POWERS = "float8_e8m0fnu"  # of two, 2^(byte - 127)

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight stands in each four bits of a word, lowest first
_FP4_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # e2m1 times 2


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What one tensor of a weight must be.

    Attributes:
        shapes: any of them.
        dtypes: any of them, by numpy's names; none for any floating-point.
        optional: the weight is complete without it.
        zeros: it may hold nothing but zeros, unless the model declares a parameter of that name.
    """

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = ()
    optional: bool = False
    zeros: bool = False


@runtime_checkable
class Encoding(Protocol):
    """How one weight is stored."""

    def expected(self, shape: Shape) -> dict[str, Expected]:
        """The tensors of a weight of `shape`, by the last part of their names."""
        ...

    def read(self, tensors: Tensors, shape: Shape, rows: slice, dtype: DTypeLike) -> Affine | np.ndarray:
        """Rows of the weight, out of its tensors by the last part of their names.

        Returns integers and scales where the format is made of them; else numbers, in `dtype` where they had to be
        computed. Raises CheckpointError, whose message begins with that last part, if a tensor holds what it may not.
        """
        ...

    def grid(self, D: int) -> Grid | None:
        """How finely a weight with D inputs is held once it is read; None for numbers."""
        ...


@dataclass(frozen=True)
class Plain:
    """The parameter as it is: one floating-point tensor."""

    def expected(self, shape: Shape) -> dict[str, Expected]:
        return {"weight": Expected(shapes=(shape,))}

    def read(self, tensors: Tensors, shape: Shape, rows: slice, dtype: DTypeLike) -> np.ndarray:
        return tensors["weight"][rows] if shape else tensors["weight"]

    def grid(self, D: int) -> None:
        return None


# --- scales ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """What shares a scale: so many rows and so many inputs of a weight; None for all of them."""

    rows: int | None
    inputs: int | None

    def shape(self, N: int, D: int) -> tuple[int, int]:
        return -(-N // (self.rows or N or 1)), -(-D // (self.inputs or D or 1))

    def shapes(self, N: int, D: int) -> tuple[Shape, ...]:
        """The shape of the scales, and what else people write for one scale or one scale per row."""
        R, G = self.shape(N, D)
        if self.inputs is not None:
            return ((R, G),)
        return ((R, G), (R,)) if self.rows is not None else ((1,), (), (1, 1))

    def spread(self, scales: np.ndarray, N: int, D: int, rows: slice) -> Float32[np.ndarray, "n G"]:
        """The scales of each of some rows."""
        wide = scales.astype(np.float32).reshape(self.shape(N, D))
        return wide[np.arange(rows.start, rows.stop) // (self.rows or N or 1)]

    def grid(self, bits: int, D: int, minima: bool) -> Grid | None:
        groups = self.shape(1, D)[1]
        return Grid(bits, groups, minima) if _even(D, self.inputs, groups) else None


def _even(D: int, group: int | None, groups: int) -> bool:
    return groups == 1 or (group is not None and D % group == 0)


def _group_of(D: int, group: int | None, groups: int, g_idx: np.ndarray | None, part: str) -> np.ndarray | None:
    """The group of each input; None where they are the neighbours that `Affine` wants.

    Writers leave `g_idx` at -1 or 0 where they did not order the inputs.
    """
    index = np.arange(D) // (group or max(D, 1))
    if g_idx is not None and g_idx.any() and not (g_idx == -1).any():
        if g_idx.min() < 0 or g_idx.max() >= groups:
            raise CheckpointError(f"{part} puts inputs into groups {g_idx.min()} to {g_idx.max()}; there are {groups}")
        index = g_idx.astype(np.int64)
        if not np.array_equal(index, np.arange(D) // (group or max(D, 1))):
            return index
    return None if _even(D, group, groups) else index


def _affine(
    codes: UInt8[np.ndarray, "n D"],
    scales: Float32[np.ndarray, "n G"],
    zeros: Integer[np.ndarray, "n G"] | None,
    bits: int,
    group_of: Int[np.ndarray, " D"] | None,
    dtype: DTypeLike,
) -> Affine | np.ndarray:
    """scale · (code - zero) for unsigned codes; the zero is in the middle where there are no `zeros`."""
    middle = 2 ** (bits - 1)
    if zeros is not None and (zeros == middle).all():
        zeros = None
    if group_of is not None:
        return _ungrouped(codes, scales, middle if zeros is None else zeros, group_of, dtype)
    packed = bits == 4 and codes.shape[1] % 2 == 0
    if packed:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    elif zeros is None:
        codes = (codes - np.uint8(middle)).view(np.int8)
    minima = None if zeros is None else scales * zeros.astype(np.float32)
    return Affine(codes=codes, scales=scales, minima=minima, bits=bits, packed=packed)


def _ungrouped(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | int, group_of: np.ndarray, dtype: DTypeLike
) -> np.ndarray:
    """Numbers, where the inputs that share a scale are not neighbours."""
    out = empty_columns(codes.shape, dtype)
    for rows in blocks_of(len(codes)):
        zero = zeros if isinstance(zeros, int) else zeros[rows][:, group_of]
        numbers = (codes[rows].astype(np.float32) - zero) * scales[rows][:, group_of]
        out[rows] = np.asarray(numbers, out.dtype)
    return out


# --- packed integers ------------------------------------------------------------------------------------------------


def _unpack(words: Integer[np.ndarray, "A B"], bits: int) -> UInt8[np.ndarray, "A B n"]:
    """The codes of 4 or 8 bits in words of 32, lowest first."""
    octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    return octets if bits == 8 else unpack_nibbles(octets)


def _unpack_down(words: Integer[np.ndarray, "A B"], bits: int, length: int) -> UInt8[np.ndarray, "length B"]:
    """Words whose codes stand under each other."""
    return _unpack(words, bits).transpose(0, 2, 1).reshape(-1, words.shape[1])[:length]


def _words(codes: int, bits: int) -> int:
    return -(-codes * bits // 32)


@dataclass(frozen=True)
class PackedIntegers:
    """compressed-tensors' `pack-quantized`: each row's codes in words of 32 bits, offset so that they are unsigned.

    Attributes:
        bits: 4 or 8.
        blocks: what shares a scale.
        symmetric: there are no zero points.
        ordered: the inputs were ordered by their activations, so that groups are not made of neighbours.
    """

    bits: int
    blocks: Blocks
    symmetric: bool
    ordered: bool = False

    def expected(self, shape: Shape) -> dict[str, Expected]:
        N, D = shape
        scales = self.blocks.shapes(N, D)
        zeros = (
            Expected(shapes=scales, dtypes=("int8", *FLOATS), optional=True, zeros=True)
            if self.symmetric
            else Expected(shapes=(self._packed_zeros(N, D), *scales), dtypes=("int32", "int8"))
        )
        return {
            "weight_packed": Expected(shapes=((N, _words(D, self.bits)),), dtypes=("int32",)),
            "weight_scale": Expected(shapes=scales, dtypes=FLOATS),
            "weight_zero_point": zeros,
            "weight_shape": Expected(shapes=((2,),), dtypes=INTEGERS, optional=True),
            "weight_g_idx": Expected(shapes=((D,),), dtypes=INTEGERS, optional=True),
        }

    def read(self, tensors: Tensors, shape: Shape, rows: slice, dtype: DTypeLike) -> Affine | np.ndarray:
        N, D = shape
        given = tensors.get("weight_shape")
        if given is not None and tuple(given) != shape:
            raise CheckpointError(f"weight_shape says {given.tolist()} of a weight of shape {[N, D]}")
        scales = self.blocks.spread(tensors["weight_scale"], N, D, rows)
        group_of = _group_of(D, self.blocks.inputs, scales.shape[1], tensors.get("weight_g_idx"), "weight_g_idx")
        zeros = None if self.symmetric else self._zeros(tensors["weight_zero_point"], N, D, rows)
        words = tensors["weight_packed"][rows]
        if self.bits == 4 and D % 2 == 0 and group_of is None:  # two to a byte, as they are wanted
            codes = np.ascontiguousarray(words).view(np.uint8)[:, : D // 2]
            minima = None if zeros is None else scales * zeros.astype(np.float32)
            return Affine(codes=codes, scales=scales, minima=minima, bits=4, packed=True)
        codes = _unpack(words, self.bits).reshape(len(words), -1)[:, :D]
        return _affine(codes, scales, zeros, self.bits, group_of, dtype)

    def _packed_zeros(self, N: int, D: int) -> Shape:
        return (_words(N, self.bits), self.blocks.shape(N, D)[1])

    def _zeros(self, given: np.ndarray, N: int, D: int, rows: slice) -> np.ndarray:
        """Unsigned zero points [n, G] of some rows: packed where rows have their own, or one signed byte each."""
        packed = given.dtype == np.int32
        if packed and self.blocks.rows == 1 and given.shape == self._packed_zeros(N, D):
            return self.blocks.spread(_unpack_down(given, self.bits, N), N, D, rows).astype(np.int16)
        if packed or given.shape not in self.blocks.shapes(N, D):
            raise CheckpointError(f"weight_zero_point cannot be {given.dtype} of shape {list(given.shape)}")
        return (self.blocks.spread(given, N, D, rows) + 2 ** (self.bits - 1)).astype(np.int16)

    def grid(self, D: int) -> Grid | None:
        return None if self.ordered else self.blocks.grid(self.bits, D, not self.symmetric)


@dataclass(frozen=True)
class Integers:
    """compressed-tensors' `int-quantized`: a signed code per byte.

    Attributes:
        blocks, symmetric, ordered: as in `PackedIntegers`.
    """

    blocks: Blocks
    symmetric: bool
    ordered: bool = False

    def expected(self, shape: Shape) -> dict[str, Expected]:
        N, D = shape
        scales = self.blocks.shapes(N, D)
        dtypes = ("int8", *FLOATS) if self.symmetric else ("int8",)
        return {
            "weight": Expected(shapes=(shape,), dtypes=("int8",)),
            "weight_scale": Expected(shapes=scales, dtypes=FLOATS),
            "weight_zero_point": Expected(shapes=scales, dtypes=dtypes, optional=self.symmetric, zeros=self.symmetric),
            "weight_g_idx": Expected(shapes=((D,),), dtypes=INTEGERS, optional=True),
        }

    def read(self, tensors: Tensors, shape: Shape, rows: slice, dtype: DTypeLike) -> Affine | np.ndarray:
        N, D = shape
        scales = self.blocks.spread(tensors["weight_scale"], N, D, rows)
        group_of = _group_of(D, self.blocks.inputs, scales.shape[1], tensors.get("weight_g_idx"), "weight_g_idx")
        zeros = None
        if not self.symmetric:
            zeros = (self.blocks.spread(tensors["weight_zero_point"], N, D, rows) + 128).astype(np.int16)
        codes = tensors["weight"][rows].view(np.uint8) + np.uint8(128)
        return _affine(codes, scales, zeros, 8, group_of, dtype)

    def grid(self, D: int) -> Grid | None:
        return None if self.ordered else self.blocks.grid(8, D, not self.symmetric)


# --- GPTQ and AWQ ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPTQ:
    """GPTQ's format: the codes of a column in words of 32 bits; the zero points packed along the outputs.

    The first version stores zero points minus one. Its writers subtract from whole words, borrowing across codes, so
    one is added to whole words. Where `symmetric` promises that all zero points are in the middle, and they are under
    either reading, they are: writers of the second version have labelled their files as of the first.

    Attributes:
        bits: 4 or 8.
        group: inputs that share a scale; None for all.
        symmetric: the zero point is in the middle.
        v2: zero points are stored as they are.
        ordered: the inputs were ordered by their activations, so that groups are not made of neighbours.
    """

    bits: int
    group: int | None
    symmetric: bool
    v2: bool
    ordered: bool

    def expected(self, shape: Shape) -> dict[str, Expected]:
        N, D = shape
        G = Blocks(1, self.group).shape(N, D)[1]
        return {
            "qweight": Expected(shapes=((_words(D, self.bits), N),), dtypes=("int32",)),
            "qzeros": Expected(shapes=((G, _words(N, self.bits)),), dtypes=("int32",)),
            "scales": Expected(shapes=((G, N),), dtypes=FLOATS),
            "g_idx": Expected(shapes=((D,),), dtypes=INTEGERS, optional=True),
            "bias": Expected(shapes=((N,),), dtypes=FLOATS, optional=True, zeros=True),
        }

    def read(self, tensors: Tensors, shape: Shape, rows: slice, dtype: DTypeLike) -> Affine | np.ndarray:
        N, D = shape
        scales = tensors["scales"][:, rows].astype(np.float32).T
        group_of = _group_of(D, self.group, scales.shape[1], tensors.get("g_idx"), "g_idx")
        zeros = self._zeros(tensors["qzeros"], N)[:, rows].T
        words = tensors["qweight"][:, rows]
        if self.bits == 4 and D % 2 == 0 and group_of is None:
            octets = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
            codes = octets.transpose(0, 2, 1).copy().reshape(-1, words.shape[1])[: D // 2]
            minima = None if (zeros == 8).all() else scales * zeros
            return Affine(codes=codes.T, scales=scales, minima=minima, bits=4, packed=True)
        return _affine(_unpack_down(words, self.bits, D).T, scales, zeros, self.bits, group_of, dtype)

    def _zeros(self, words: np.ndarray, N: int) -> Integer[np.ndarray, "G N"]:
        ones = np.uint32(0x11111111 if self.bits == 4 else 0x01010101)
        stored = words.astype(np.int32).view(np.uint32)
        readings = (stored, stored + ones) if self.v2 else (stored + ones, stored)
        if self.symmetric and any((reading == ones << np.uint32(self.bits - 1)).all() for reading in readings):
            return np.full((len(words), N), 2 ** (self.bits - 1), np.uint8)
        return _unpack(readings[0].view(np.int32), self.bits).reshape(len(words), -1)[:, :N]

    def grid(self, D: int) -> Grid | None:
        return None if self.ordered else Blocks(1, self.group).grid(self.bits, D, not self.symmetric)


@dataclass(frozen=True)
class AWQ:
    """AutoAWQ's `gemm` format: eight outputs of 4 bits in a word, in an order of its own, with zero points.

    Attributes:
        group: inputs that share a scale; None for all.
    """

    group: int | None

    def expected(self, shape: Shape) -> dict[str, Expected]:
        N, D = shape
        G = Blocks(1, self.group).shape(N, D)[1]
        return {
            "qweight": Expected(shapes=((D, _words(N, 4)),), dtypes=("int32",)),
            "qzeros": Expected(shapes=((G, _words(N, 4)),), dtypes=("int32",)),
            "scales": Expected(shapes=((G, N),), dtypes=FLOATS),
        }

    def read(self, tensors: Tensors, shape: Shape, rows: slice, dtype: DTypeLike) -> Affine | np.ndarray:
        D = shape[1]
        scales = tensors["scales"][:, rows].astype(np.float32).T
        zeros = self._codes(tensors["qzeros"])[:, rows].T
        codes = self._codes(tensors["qweight"])[:, rows].T
        return _affine(codes, scales, zeros, 4, _group_of(D, self.group, scales.shape[1], None, "scales"), dtype)

    def _codes(self, words: np.ndarray) -> UInt8[np.ndarray, "A B"]:
        stored = _unpack(words, 4)
        codes = np.empty_like(stored)
        for place, output in enumerate(_AWQ_ORDER):
            codes[..., output] = stored[..., place]
        return codes.reshape(len(words), -1)

    def grid(self, D: int) -> Grid | None:
        return Blocks(1, self.group).grid(4, D, True)


# --- floats of 8 and 4 bits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Float8:
    """Floats of 8 bits (e4m3) times scales, which DeepSeek calls `weight_scale_inv` and others `weight_scale`.

    Attributes:
        blocks: what shares a scale.
        scale: the last part of the scales' name.
        powers: scales in bytes are exponents of two.
    """

    blocks: Blocks
    scale: str = "weight_scale"
    powers: bool = False

    def expected(self, shape: Shape) -> dict[str, Expected]:
        scales = self.blocks.shapes(*shape)
        dtypes = (*FLOATS, POWERS, "uint8") if self.powers else (*FLOATS, POWERS)
        return {
            "weight": Expected(shapes=(shape,), dtypes=(FLOAT8,)),
            self.scale: Expected(shapes=scales, dtypes=dtypes),
            "weight_zero_point": Expected(shapes=scales, dtypes=(FLOAT8, *FLOATS), optional=True, zeros=True),
        }

    def read(self, tensors: Tensors, shape: Shape, rows: slice, dtype: DTypeLike) -> Affine | np.ndarray:
        N, D = shape
        given = tensors[self.scale]
        scales = self.blocks.spread(given.view(POWERS) if given.dtype == np.uint8 else given, N, D, rows)
        weight = Affine(codes=tensors["weight"][rows].view(np.uint8), scales=scales, minima=None, bits=8, floats=True)
        if self.grid(D):
            return weight
        inputs = np.arange(D) // (self.blocks.inputs or max(D, 1))
        return replace(weight, scales=scales[:, inputs]).values(dtype)

    def grid(self, D: int) -> Grid | None:
        inputs = self.blocks.inputs or D
        return Grid(8, D // inputs) if inputs and D % inputs == 0 else None


@dataclass(frozen=True)
class MXFP4:
    """Floats of 4 bits (e2m1) in blocks of 32 inputs that share a power of two."""

    def expected(self, shape: Shape) -> dict[str, Expected]:
        N, G = shape[0], -(-shape[1] // 32)
        return {
            "weight_blocks": Expected(shapes=((N, G, 16),), dtypes=("uint8",)),
            "weight_scales": Expected(shapes=((N, G),), dtypes=("uint8", POWERS)),
        }

    def read(self, tensors: Tensors, shape: Shape, rows: slice, dtype: DTypeLike) -> Affine | np.ndarray:
        weight = mxfp4(tensors["weight_blocks"][rows], tensors["weight_scales"][rows].view(np.uint8))
        return weight if shape[1] % 32 == 0 else weight.values(dtype)[:, : shape[1]]

    def grid(self, D: int) -> Grid | None:
        return Grid(5, D // 32) if D % 32 == 0 else None


@dataclass(frozen=True)
class MXFP4Experts:
    """The same of all experts of a layer, as gpt-oss has them: numbers [E, D, N], but blocks of the rows of outputs."""

    def expected(self, shape: Shape) -> dict[str, Expected]:
        E, D, N = shape
        G = -(-D // 32)
        return {
            "_blocks": Expected(shapes=((E, N, G, 16),), dtypes=("uint8",)),
            "_scales": Expected(shapes=((E, N, G),), dtypes=("uint8", POWERS)),
        }

    def read(self, tensors: Tensors, shape: Shape, rows: slice, dtype: DTypeLike) -> Affine | np.ndarray:
        D = shape[1]
        weight = mxfp4(tensors["_blocks"][rows], tensors["_scales"][rows].view(np.uint8))
        return weight if D % 32 == 0 else weight.values(dtype)[..., :D].swapaxes(-1, -2)

    def grid(self, D: int) -> Grid | None:
        return MXFP4().grid(D)


def mxfp4(blocks: UInt8[np.ndarray, "*N G 16"], scales: UInt8[np.ndarray, "*N G"]) -> Affine:
    """Floats of 4 bits as integers, twice as large, and scales, half as large: exactly, in 8 bits.

    Experts as gpt-oss has them, blocks [E, rows, G, 16], give an `Affine` with the leading dims [E, rows]; its tensors'
    rows are the outputs.
    """
    codes = _FP4_DOUBLED[unpack_nibbles(blocks)].reshape(*scales.shape[:-1], -1)
    powers = np.ldexp(np.float32(1), scales.astype(np.int32) - 128)
    return Affine(codes=codes, scales=np.where(scales == 255, np.float32(np.nan), powers), minima=None, bits=5)
