"""The tensor formats of ggml: floats, and blocks of small integers that share a scale.

A row is a sequence of blocks, each a packed record of scales and codes. Layouts: `block_q4_0` to `block_q6_K` in
https://github.com/ggml-org/ggml (src/ggml-common.h); formulas: `dequantize_row_*` in src/ggml-quants.c. The formats
whose names end in `_K` have super-blocks of 256 weights, whose 8 or 16 groups have small scales of their own that a
float16 multiplies.

Every block format is affine: a weight is `scale · code - minimum`, with one scale, and in some formats one minimum, for
each group of 16 or 32 weights of a row. `unpack` gives those parts; `dequantize` multiplies them out, bit for bit as
the published formulas do in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8

from tenfold.base.affine import Affine


class GGMLType(IntEnum):
    """The formats that are implemented, by their numbers in GGUF files."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30
    MXFP4 = 39


_IQ_TYPES = ("IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS")
_OTHERS = {9: "Q8_1", 15: "Q8_K", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 41: "Q1_0"}
OTHER_TYPES = _OTHERS | dict(enumerate((*_IQ_TYPES, "I8", "I16", "I32", "I64", "F64"), start=16))
"""Names of the formats that are not implemented, for messages."""

FLOATS = {
    GGMLType.F32: np.dtype(np.float32),
    GGMLType.F16: np.dtype(np.float16),
    GGMLType.BF16: np.dtype(ml_dtypes.bfloat16),
}
"""The formats without blocks."""


class _Parts(NamedTuple):
    """What the blocks [N blocks] hold: codes [N, block], and scales and minima [N, block / group]."""

    codes: np.ndarray
    scales: np.ndarray
    minima: np.ndarray | None


@dataclass(frozen=True)
class _Format:
    """A block format: its packed record, how many weights it holds, and how its parts are taken out."""

    record: np.dtype
    weights: int
    group: int
    bits: int
    parts: Callable[[np.ndarray], _Parts]


def row_size(type: GGMLType, columns: int) -> int:
    """Bytes of a row of `columns` weights.

    Raises:
        ValueError: if they are not a whole number of blocks.
    """
    if type in FLOATS:
        return columns * FLOATS[type].itemsize
    blocks, rest = divmod(columns, _FORMATS[type].weights)
    if rest:
        raise ValueError(f"a row of {columns} weights is not a whole number of {type.name} blocks: {block_size(type)}")
    return blocks * _FORMATS[type].record.itemsize


def block_size(type: GGMLType) -> int:
    """How many weights a block holds; 1 for floats."""
    return 1 if type in FLOATS else _FORMATS[type].weights


def unpack(raw: UInt8[np.ndarray, "*rows B"], type: GGMLType) -> Affine:
    """The codes, scales and minima of rows of blocks.

    Args:
        raw: the rows' bytes, contiguous.
        type: a block format.

    Raises:
        ValueError: if the format has no blocks, or the rows are not whole numbers of them.
    """
    if type in FLOATS:
        raise ValueError(f"{type.name} has no blocks to unpack")
    fmt = _FORMATS[type]
    if raw.shape[-1] % fmt.record.itemsize:
        raise ValueError(f"a row of {raw.shape[-1]} bytes is not a whole number of {type.name} blocks")
    rows, blocks = raw.shape[:-1], raw.shape[-1] // fmt.record.itemsize
    groups = (*rows, blocks * (fmt.weights // fmt.group))
    with np.errstate(invalid="ignore"):
        parts = fmt.parts(np.ascontiguousarray(raw).reshape(-1).view(fmt.record))
    return Affine(
        codes=parts.codes.reshape(*rows, blocks * fmt.weights),
        scales=parts.scales.reshape(groups),
        minima=None if parts.minima is None else parts.minima.reshape(groups),
        bits=fmt.bits,
    )


def dequantize(raw: UInt8[np.ndarray, "*rows B"], type: GGMLType) -> Float32[np.ndarray, "*rows C"]:
    """The weights that rows of bytes hold, in float32, bit for bit as published."""
    if type in FLOATS:
        return np.ascontiguousarray(raw).view(FLOATS[type]).astype(np.float32)
    return unpack(raw, type).values()


def quantize(values: Float[np.ndarray, "*rows C"], type: GGMLType) -> UInt8[np.ndarray, "*rows B"]:
    """The bytes of rows of weights, rounded as ggml's reference does.

    Args:
        values: of any float dtype; finite for the block formats.
        type: F32, F16, BF16, Q8_0 or Q4_0.

    Raises:
        ValueError: for another format, for rows that are not whole numbers of blocks, and for values that are not
            finite or so large that their scale is not.
    """
    if type in FLOATS:
        return np.ascontiguousarray(values, FLOATS[type]).view(np.uint8).reshape(*values.shape[:-1], -1)
    if type not in _ENCODERS:
        raise ValueError(f"quantising to {type.name} is not implemented")
    size = row_size(type, values.shape[-1])
    blocks = np.asarray(values, np.float32).reshape(-1, block_size(type))
    records = np.empty(len(blocks), _FORMATS[type].record)
    with np.errstate(over="ignore", invalid="ignore"):
        _ENCODERS[type](blocks, records)
    if not np.isfinite(records["d"]).all():
        raise ValueError(f"the values are not finite, or too large for the scales of {type.name}, which are float16")
    return records.view(np.uint8).reshape(*values.shape[:-1], size)


# --- blocks of 32 ---------------------------------------------------------------------------------------------------


def _float32(halves: np.ndarray) -> np.ndarray:
    return halves.astype(np.float32)[:, None]


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """[N, n] bytes to [N, 2n] codes: the low nibbles, then the high ones."""
    codes = np.empty((len(packed), 2, packed.shape[1]), np.uint8)
    np.bitwise_and(packed, 15, out=codes[:, 0])
    np.right_shift(packed, 4, out=codes[:, 1])
    return codes.reshape(len(packed), 2 * packed.shape[1])


def _signed(codes: np.ndarray, zero: int) -> np.ndarray:
    """Unsigned codes less their zero point, in place."""
    signed = codes.view(np.int8)
    signed -= zero
    return signed


def _q8_0(b: np.ndarray) -> _Parts:
    return _Parts(b["codes"], _float32(b["d"]), None)


def _q4_0(b: np.ndarray) -> _Parts:
    return _Parts(_signed(_nibbles(b["low"]), 8), _float32(b["d"]), None)


def _q4_1(b: np.ndarray) -> _Parts:
    return _Parts(_nibbles(b["low"]), _float32(b["d"]), -_float32(b["m"]))


def _five_bits(b: np.ndarray) -> np.ndarray:
    """The low four bits of each code, and the fifth from the bits of `high`, least significant first."""
    fifth = np.unpackbits(b["high"], axis=-1, bitorder="little")
    fifth <<= 4
    fifth |= _nibbles(b["low"])
    return fifth


def _q5_0(b: np.ndarray) -> _Parts:
    return _Parts(_signed(_five_bits(b), 16), _float32(b["d"]), None)


def _q5_1(b: np.ndarray) -> _Parts:
    return _Parts(_five_bits(b), _float32(b["d"]), -_float32(b["m"]))


# --- super-blocks of 256 --------------------------------------------------------------------------------------------


def _crumbs(packed: np.ndarray) -> np.ndarray:
    """[N, n, 32] bytes to [N, n, 4, 32] codes of two bits: all the lowest, then the next, and so on."""
    codes = packed[:, :, None, :] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    codes &= 3
    return codes


def _six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8 scales and 8 minima, of six bits each, in the 12 bytes of Q4_K and Q5_K.

    Bytes 0-3 and 4-7 are the first four scales and minima; their upper two bits are those of the last four, whose lower
    four bits share bytes 8-11.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _q2_k(b: np.ndarray) -> _Parts:
    codes = _crumbs(b["low"].reshape(-1, 2, 32))
    return _Parts(codes, _float32(b["d"]) * (b["scales"] & 15), _float32(b["dmin"]) * (b["scales"] >> 4))


def _q3_k(b: np.ndarray) -> _Parts:
    codes = _crumbs(b["low"].reshape(-1, 2, 32)).reshape(-1, 8, 32)
    third = b["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]
    third &= 1
    third <<= 2
    codes |= third
    low = np.concatenate([b["scales"][:, :8] & 15, b["scales"][:, :8] >> 4], axis=1)
    high = (b["scales"][:, None, 8:] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3).reshape(-1, 16)
    return _Parts(_signed(codes, 4), _float32(b["d"]) * _signed(low | (high << 4), 32), None)


def _q4_k(b: np.ndarray) -> _Parts:
    scales, minima = _six_bit_scales(b["scales"])
    codes = _nibbles(b["low"].reshape(-1, 32))
    return _Parts(codes, _float32(b["d"]) * scales, _float32(b["dmin"]) * minima)


def _q5_k(b: np.ndarray) -> _Parts:
    scales, minima = _six_bit_scales(b["scales"])
    fifth = b["high"][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]
    fifth &= 1
    fifth <<= 4
    fifth |= _nibbles(b["low"].reshape(-1, 32)).reshape(fifth.shape)
    return _Parts(fifth, _float32(b["d"]) * scales, _float32(b["dmin"]) * minima)


def _q6_k(b: np.ndarray) -> _Parts:
    high = _crumbs(b["high"].reshape(-1, 2, 32))
    high <<= 4
    high |= _nibbles(b["low"].reshape(-1, 64)).reshape(high.shape)
    return _Parts(_signed(high, 32), _float32(b["d"]) * b["scales"], None)


_FP4_DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)


def _mxfp4(b: np.ndarray) -> _Parts:
    """Floats of 4 bits (e2m1) as integers, twice as large, and powers of two, half as large: exactly."""
    codes = _FP4_DOUBLED[_nibbles(b["low"].reshape(-1, 16))].reshape(len(b), 32)
    return _Parts(codes, np.ldexp(np.float32(1), b["e"].astype(np.int32) - 128)[:, None], None)


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")


def _bytes(name: str, count: int) -> tuple[str, str, int]:
    return (name, "u1", count)


_SIX_BITS = _bytes("scales", 12)
_FORMATS: dict[GGMLType, _Format] = {
    type: _Format(np.dtype(fields), weights, group, bits, parts)
    for type, weights, group, bits, parts, fields in (
        (GGMLType.Q8_0, 32, 32, 8, _q8_0, [_D, ("codes", "i1", 32)]),
        (GGMLType.Q4_0, 32, 32, 4, _q4_0, [_D, _bytes("low", 16)]),
        (GGMLType.Q4_1, 32, 32, 4, _q4_1, [_D, _M, _bytes("low", 16)]),
        (GGMLType.Q5_0, 32, 32, 5, _q5_0, [_D, _bytes("high", 4), _bytes("low", 16)]),
        (GGMLType.Q5_1, 32, 32, 5, _q5_1, [_D, _M, _bytes("high", 4), _bytes("low", 16)]),
        (GGMLType.Q2_K, 256, 16, 2, _q2_k, [_bytes("scales", 16), _bytes("low", 64), _D, _DMIN]),
        (GGMLType.Q3_K, 256, 16, 3, _q3_k, [_bytes("high", 32), _bytes("low", 64), _SIX_BITS, _D]),
        (GGMLType.Q4_K, 256, 32, 4, _q4_k, [_D, _DMIN, _SIX_BITS, _bytes("low", 128)]),
        (GGMLType.Q5_K, 256, 32, 5, _q5_k, [_D, _DMIN, _SIX_BITS, _bytes("high", 32), _bytes("low", 128)]),
        (GGMLType.MXFP4, 32, 32, 5, _mxfp4, [("e", "u1"), _bytes("low", 16)]),
        (GGMLType.Q6_K, 256, 16, 6, _q6_k, [_bytes("low", 128), _bytes("high", 64), ("scales", "i1", 16), _D]),
    )
}


# --- quantising -----------------------------------------------------------------------------------------------------


def _inverse(scales: np.ndarray) -> np.ndarray:
    return np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)


def _encode_q8_0(blocks: np.ndarray, records: np.ndarray) -> None:
    """The largest magnitude becomes ±127; halves are rounded away from zero."""
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scales)
    whole = np.trunc(scaled)
    whole += np.trunc((scaled - whole) * 2)
    records["d"], records["codes"] = scales[:, 0], whole


def _encode_q4_0(blocks: np.ndarray, records: np.ndarray) -> None:
    """The value of the largest magnitude becomes -8, whatever its sign; halves are rounded up."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scales = largest / np.float32(-8)
    codes = np.minimum((blocks * _inverse(scales) + np.float32(8.5)).astype(np.uint8), 15)
    records["d"], records["low"] = scales[:, 0], codes[:, :16] | (codes[:, 16:] << 4)


_ENCODERS: dict[GGMLType, Callable[[np.ndarray, np.ndarray], None]] = {
    GGMLType.Q8_0: _encode_q8_0,
    GGMLType.Q4_0: _encode_q4_0,
}
