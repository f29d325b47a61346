"""What loading has in common, whatever the files: one weight after the other, each finished before the next is read."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from tenfold.kernels.matmul import QuantizedWeight
from tenfold.nn.param import Param, Tree, is_param

Read = Callable[[Param, Any], jax.Array | QuantizedWeight]
"""Loads one weight, with a sharding or None."""

Finish = Callable[[Param, jax.Array | QuantizedWeight], Any]
"""Makes what stands in the tree out of a loaded weight, such as a repacked one."""


def load_params(
    tree: Tree, dtype: DTypeLike, read: Read, *, shardings: Tree, finish: Finish | None, progress: bool
) -> Tree:
    """The weights of a declaration tree, in the same tree. Arguments but `read` are those of `checkpoint.load`."""
    params, treedef = jax.tree.flatten(tree, is_leaf=is_param)
    targets = [None] * len(params) if shardings is None else treedef.flatten_up_to(shardings)
    sizes = [math.prod(p.shape) * jnp.dtype(dtype).itemsize for p in params]
    columns = (TextColumn("Loading weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    weights: list[Any] = []
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("", total=sum(sizes))
        for p, target, size in zip(params, targets, sizes, strict=True):
            weight = read(p, target)
            weights.append(jax.block_until_ready(finish(p, weight)) if finish else weight)
            bar.advance(task, size)
    return treedef.unflatten(weights)
