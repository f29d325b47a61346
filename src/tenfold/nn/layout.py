"""Einops layouts between a checkpoint's tensor and ours, read in both directions.

A layout such as "(H K) D -> D H K" splits and reorders dims and loses nothing. Its right side names our dims one by
one, so our shape gives every length that either direction needs. A "1" on its left side is a dim that we leave out.
"""

import functools
import math
import re
from typing import Any

from einops import rearrange


@functools.cache
def split_layout(layout: str) -> tuple[list[list[str]], list[str]]:
    """The groups of the left side and the names of the right side."""
    left, _, right = layout.partition("->")
    groups = [group.strip("()").split() for group in re.findall(r"\([^()]*\)|[^\s()]+", left)]
    return groups, right.split()


@functools.cache  # thousands of experts have the same few
def check_layout(layout: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the layout's right side names the dims of `shape`, each once, and its left side too."""
    groups, names = split_layout(layout)
    given = sorted(name for group in groups for name in group if name != "1")
    if not all(map(str.isidentifier, names)) or len(names) != len(shape) or sorted(set(names)) != given:
        raise ValueError(f"the layout {layout!r} is not a bijection onto the dims of {shape}")


@functools.cache
def checkpoint_shape(layout: str | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the checkpoint of a tensor that has `shape` in the model."""
    if layout is None:
        return shape
    groups, names = split_layout(layout)
    lengths = {"1": 1, **dict(zip(names, shape, strict=True))}
    return tuple(math.prod(lengths[name] for name in group) for group in groups)


def to_model(x: Any, layout: str | None, shape: tuple[int, ...]) -> Any:
    """A checkpoint's tensor with our dims. Of a numpy array that is a view, whatever the layout: nothing is read."""
    if layout is None:
        return x
    return rearrange(x, layout, **dict(zip(split_layout(layout)[1], shape, strict=True)))


def to_checkpoint(x: Any, layout: str | None) -> Any:
    """Our tensor with the checkpoint's dims."""
    if layout is None:
        return x
    left, _, right = layout.partition("->")
    return rearrange(x, f"{right.strip()} -> {left.strip()}")
