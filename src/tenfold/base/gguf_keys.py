"""A GGUF file's metadata under its architecture's name, read with care for what they say and what is left unread."""

from typing import Any, cast

import numpy as np

from tenfold.base.errors import CheckpointError, UnsupportedModelError
from tenfold.base.gguf import GGUFFile

_NEUTRAL = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("reference", "Meta AI original pth"),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_ext_factor": (1.0,),
}
"""Values that ask for nothing."""


class Keys:
    """Reads a file's metadata under its architecture's name, and remembers what was asked for."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._prefix = f"{file.metadata['general.architecture']}."
        self._asked: set[str] = set()

    def values(self, key: str) -> Any:
        """The value of a key or None. An array that has one value for all layers is that value."""
        self._asked.add(key)
        value = self._file.metadata.get(self._prefix + key)
        if not isinstance(value, np.ndarray):
            return value
        array = cast("np.ndarray", value)
        return array[0].item() if array.size and (array == array[0]).all() else array

    def get(self, key: str) -> Any:
        """The value of a key that all layers share, or None."""
        value = self.values(key)
        if isinstance(value, np.ndarray | list):
            raise self.unsupported(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. A float32 is the shortest decimal that means it."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e38:
            raise self.damaged(key, value, "a number")
        short = float(str(np.float32(value)))
        return short if np.float32(value) == value else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self.damaged(key, value, "a positive integer")
        return value

    def flag(self, key: str) -> bool:
        """A boolean; False where the file does not say."""
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.damaged(key, value, "a boolean")
        return bool(value)

    def count_or_none(self, key: str) -> int | None:
        """A positive integer, if there is one: 0 stands for none."""
        return self.count(key) if self.get(key) not in (None, 0) else None

    def window(self) -> int | None:
        """The sliding window, if there is one."""
        return self.count_or_none("attention.sliding_window")

    def damaged(self, key: str, value: Any, wanted: str) -> CheckpointError:
        """The error for a value that cannot be."""
        found = "no value" if value is None else f"{value!r:.80}"
        return CheckpointError(f"{self._file.path} has {found} as {self._prefix}{key} instead of {wanted}")

    def unsupported(self, key: str, value: Any) -> UnsupportedModelError:
        """The error for a value that is not implemented."""
        return UnsupportedModelError(
            f"{self._file.path} has {value!r:.80} as {self._prefix}{key}, which is not implemented"
        )

    def refuse_rest(self) -> None:
        """Raises the error for a key that nobody asked for, unless its value changes nothing."""
        for full, value in self._file.metadata.items():
            key = full.removeprefix(self._prefix)
            neutral = not isinstance(value, np.ndarray | list) and value in _NEUTRAL.get(key, ())
            if full.startswith(self._prefix) and key not in self._asked and not neutral:
                raise self.unsupported(key, value)
