"""A parameter as it stands in a checkpoint: under which names, and in which encoding."""

from dataclasses import dataclass

import numpy as np
from jax.typing import DTypeLike

from tenfold.base.affine import Affine
from tenfold.base.errors import CheckpointError
from tenfold.nn.encodings import Encoding, Expected, Float8, MXFP4Experts, Plain, Shape, Tensors


@dataclass(frozen=True)
class Stored:
    """A parameter in a checkpoint: its name and shape there, all of a fused tensor's, and its encoding."""

    name: str
    shape: Shape
    encoding: Encoding

    @property
    def integers(self) -> bool:
        """Whether it is made of integers with scales, and so could be held without rounding."""
        return not isinstance(self.encoding, Plain | Float8)

    def tensor(self, part: str) -> str:
        """The full name of one of its tensors."""
        return self.name if part == "weight" else self.name.removesuffix("weight") + part

    def expected(self) -> dict[str, Expected]:
        """Its tensors, by their full names."""
        return {self.tensor(part): expected for part, expected in self.encoding.expected(self.shape).items()}

    def read(self, tensors: Tensors, rows: tuple[int, int] | None, dtype: DTypeLike) -> Affine | np.ndarray:
        """All of it or some rows, out of its tensors by their full names; as `Encoding.read`."""
        parts = {part: self.tensor(part) for part in self.encoding.expected(self.shape)}
        found = {part: tensors[name] for part, name in parts.items() if name in tensors}
        whole = (0, self.shape[0]) if self.shape else (0, 1)
        try:
            with np.errstate(invalid="ignore", over="ignore"):  # damaged scales give weights that are not finite
                return self.encoding.read(found, self.shape, slice(*(rows or whole)), dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{self.name.removesuffix('weight')}{error}; the checkpoint is damaged") from None

    def numbers(self, read: Affine | np.ndarray, dtype: DTypeLike) -> np.ndarray:
        """What `read` gave, with the dims that the parameter itself has in a checkpoint."""
        if not isinstance(read, Affine):
            return read
        values = read.values(dtype)
        return values.swapaxes(-1, -2) if isinstance(self.encoding, MXFP4Experts) else values
