"""Rows of weights in few bits: integers, and a scale for each group of neighbours.

What all formats of quantised weights, in safetensors and in GGUF files, are unpacked to, so that nothing is rounded
again. Imports no jax.

Dims: N rows, one per output; D inputs; G groups of D / G inputs; C numbers that hold a row's codes.
"""

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, Integer
from numpy.typing import DTypeLike

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
ROWS = 16  # that are computed or turned at a time: few enough to stay in the cache


@dataclass(frozen=True, kw_only=True)
class Affine:
    """Rows of weights as checkpoints hold them, one row per output: weight = scale · code - minimum.

    Attributes:
        codes: int8 around zero where there are no minima; else uint8 from zero. [N, D], or [N, D / 2] if packed.
        scales: of each group of D / G inputs.
        minima: of each group, or None for formats that are symmetric about zero.
        bits: how many bits the largest code needs.
        packed: the codes are of 4 bits, two to a byte with the even input in the low half, and unsigned: around 8 where
            there are no minima.
        floats: the codes are floats of 8 bits (e4m3), as the bytes that they are.
    """

    codes: Integer[np.ndarray, "*N C"]
    scales: Float32[np.ndarray, "*N G"]
    minima: Float32[np.ndarray, "*N G"] | None
    bits: int
    packed: bool = False
    floats: bool = False

    @property
    def inputs(self) -> int:
        return self.codes.shape[-1] * (2 if self.packed else 1)

    @property
    def group(self) -> int:
        return self.inputs // self.scales.shape[-1]

    def part(self, index: int) -> "Affine":
        """The rows at an index of the first dim."""
        minima = None if self.minima is None else self.minima[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], minima=minima)

    def values(self, dtype: DTypeLike = np.float32) -> Float[np.ndarray, "*N D"]:
        """The weights, computed in float32, with the columns of a matrix contiguous in memory.

        Groups whose scale is not finite, in a damaged file, have weights that are not.
        """
        shape = (*self.codes.shape[:-1], self.inputs)
        codes, scales = self.codes.reshape(-1, self.codes.shape[-1]), self.scales.reshape(-1, self.scales.shape[-1])
        minima = None if self.minima is None else self.minima.reshape(scales.shape)
        out = empty_columns((len(codes), self.inputs), dtype)
        for rows in blocks_of(len(codes)):
            part = unpack_nibbles(codes[rows]) if self.packed else codes[rows]
            part = _E4M3[part] if self.floats else part
            grouped = part.reshape(-1, scales.shape[1], self.group).astype(np.float32)
            with np.errstate(invalid="ignore", over="ignore"):
                if self.packed and minima is None:
                    grouped -= 8
                grouped *= scales[rows, :, None]
                if minima is not None:
                    grouped -= minima[rows, :, None]
                out[rows] = np.asarray(grouped.reshape(-1, self.inputs), out.dtype)
        return out.reshape(shape)


def blocks_of(rows: int) -> list[slice]:
    """Cuts rows into blocks of `ROWS`."""
    return [slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS)]


def empty_columns(shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
    """A matrix to fill, with contiguous columns: turned, as products want it, it lies in order."""
    return np.empty(shape[::-1], np.dtype(dtype)).T


def unpack_nibbles(codes: Integer[np.ndarray, "*N C"]) -> Integer[np.ndarray, "*N D"]:
    """The codes of 4 bits in bytes that hold two, the first in the low half."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
