"""Loading weights from a GGUF file.

Weights in blocks that products use are held as they are stored, unrounded: in 4 bits if their codes need no more, and
else in 8. All others become arrays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from tenfold.base import ggml_blocks, gguf, gguf_names
from tenfold.base.affine import Affine
from tenfold.base.errors import CheckpointError
from tenfold.base.files import find_gguf
from tenfold.base.ggml_blocks import FLOATS
from tenfold.base.gguf import GGUFFile
from tenfold.base.gguf_names import TensorSource
from tenfold.kernels.matmul import QuantizedWeight
from tenfold.nn import transfer
from tenfold.nn.layout import to_model
from tenfold.nn.loading import Finish, load_params
from tenfold.nn.param import Param, Source, Tree, is_param
from tenfold.nn.quantization import Grid, hold

_SHOWN = 5


@dataclass(frozen=True)
class GGUFFormat:
    """How the weights of one GGUF model are stored: the file, and where it has a checkpoint's tensors."""

    file: GGUFFile
    tensors: Mapping[str, TensorSource]

    def find(self, source: Source) -> TensorSource | None:
        """Where a parameter stands, under its name or an alias."""
        return next((self.tensors[name] for name in (source.name, *source.aliases) if name in self.tensors), None)

    def shape(self, stored: TensorSource) -> tuple[int, ...]:
        """The shape of a checkpoint's tensor, by the file's own; of what does not fit together, the first one's."""
        shape = self.file.infos[stored.name].shape
        if stored.expert is not None:
            return shape[1:]
        other = self.file.infos.get(stored.ups or stored.values or stored.name)
        if stored.values is not None and other and len(shape) == 3 and other.shape[::2] == shape[:2]:
            return shape[0] * (shape[2] + other.shape[1]), shape[1]
        if stored.ups is not None and other and other.shape == shape:
            shape = (shape[0], 2 * shape[1], *shape[2:])
        return (*shape[:1], *shape[:0:-1]) if stored.turned else shape

    def grid(self, p: Param) -> Grid | None:
        """How finely a weight is held once it is loaded; None for a plain array."""
        stored = self.find(p.sources[0])
        if not p.inputs or p.stacked or stored is None:
            return None
        info = self.file.infos[stored.name]
        if info.type in FLOATS:
            return None
        block = np.zeros((1, ggml_blocks.row_size(info.type, ggml_blocks.block_size(info.type))), np.uint8)
        affine = ggml_blocks.unpack(block, info.type)
        return Grid(affine.bits, info.shape[-1] // affine.group, affine.minima is not None)


def read_format(path: Path) -> GGUFFormat:
    """How the weights are stored in a directory that has them in GGUF.

    Raises:
        CheckpointError: if there is no file, or it is damaged.
        UnsupportedModelError: for an architecture, or a tensor of it, that is not implemented.
    """
    files = find_gguf(path)
    if not files:
        raise CheckpointError(f"{path} has no *.gguf file, or has safetensors beside it")
    file = gguf.open(files[0])
    return GGUFFormat(file, gguf_names.map_tensors(file))


def load(
    path: Path,
    tree: Tree,
    dtype: DTypeLike,
    *,
    finish: Finish | None = None,
    shardings: Tree = None,
    progress: bool = False,
) -> Tree:
    """The weights of a directory that has them in GGUF. Arguments and errors are those of `checkpoint.load`."""
    form = read_format(path)
    _verify(form, jax.tree.leaves(tree, is_leaf=is_param))

    def read(p: Param, target: Any) -> jax.Array | QuantizedWeight:
        return _load_param(p, form, dtype, target)

    return load_params(tree, dtype, read, shardings=shardings, finish=finish, progress=progress)


def _verify(form: GGUFFormat, params: Sequence[Param]) -> None:
    """Raises CheckpointError with all tensors that are missing, not expected, or of another shape."""
    shapes: dict[str, tuple[int, ...]] = {}  # of whole tensors, by their sources' names
    found: dict[str, TensorSource | None] = {}
    known: set[str] = set()
    for param, source in [(p, source) for p in params for source in p.sources]:
        shape = param.checkpoint_shape(source)
        if source.rows is not None:
            shape = (max(source.rows[1], *shapes.get(source.name, (0,))[:1]), *shape[1:])
        shapes[source.name] = shape
        found[source.name] = form.find(source)
        known |= {source.name, *source.aliases}
    missing = [name for name, stored in found.items() if stored is None]
    unexpected = [stored.name for name, stored in form.tensors.items() if name not in known]
    wrong = [
        f"{stored.name} has the shape {list(form.shape(stored))} instead of {list(shapes[name])}"
        for name, stored in found.items()
        if stored is not None and _without_ones(form.shape(stored)) != _without_ones(shapes[name])
    ]
    problems = [
        f"{len(lines)} {what}: {', '.join(lines[:_SHOWN])}" + (", and more" if len(lines) > _SHOWN else "")
        for what, lines in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", wrong))
        if lines
    ]
    if problems:
        raise CheckpointError(
            f"the tensors in {form.file.path} are not those that its metadata ask for. " + "; ".join(problems)
        )


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without dims of 1, which files have or leave out."""
    return tuple(size for size in shape if size > 1)


def _load_param(p: Param, form: GGUFFormat, dtype: DTypeLike, target: Any) -> jax.Array | QuantizedWeight:
    stored = [found for source in p.sources if (found := form.find(source)) is not None]
    read = [_read(form.file, s, source.rows) for s, source in zip(stored, p.sources, strict=True)]
    weight = hold(p, read) if p.inputs and not p.stacked and target is None else None
    if weight is None:
        arrays = [rows.values(dtype) if isinstance(rows, Affine) else rows for rows in read]
        arrays = [a.swapaxes(-1, -2) if s.turned else a for a, s in zip(arrays, stored, strict=True)]
        arrays = [array.reshape(p.checkpoint_shape(s)) for array, s in zip(arrays, p.sources, strict=True)]
        parts = [to_model(array, s.layout, p.source_shape) for array, s in zip(arrays, p.sources, strict=True)]
        weight = transfer.place(parts, dtype, stack_shape=p.stack_shape, sharding=target, release=form.file.release)
    for name in {name for s in stored for name in (s.name, s.ups, s.values) if name is not None}:
        form.file.release(form.file[name])
    return weight


def _read(file: GGUFFile, stored: TensorSource, rows: tuple[int, int] | None) -> Affine | np.ndarray:
    """A checkpoint's tensor, or some rows of it: codes and scales where a matrix is in blocks, and else numbers."""
    if stored.values is not None:
        return _joined(file.dequantize(stored.name), file.dequantize(stored.values))
    info, raw = file.infos[stored.name], file[stored.name]
    raw = raw if stored.expert is None else raw[stored.expert]
    file.will_need(raw)
    blocks = info.type not in FLOATS
    if stored.ups is not None and file.infos[stored.ups].type == info.type:
        raw = _alternating(raw, file[stored.ups])
    elif stored.ups is not None:
        raw, blocks = _alternating(file.dequantize(stored.name), file.dequantize(stored.ups)), False
    if stored.offset or (blocks and len(info.shape) < 2):
        raw, blocks = file.dequantize(stored.name) - np.float32(stored.offset), False
    order = stored.rows(len(raw)) if info.shape else None
    if order is not None:
        raw = raw[order]
    if rows is not None:
        raw = raw[slice(*rows)]
    return ggml_blocks.unpack(raw, info.type) if blocks else raw


def _joined(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each head's rows for keys, out of [H, R, K], and for values, [H, V, R], as rows of one matrix."""
    return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, values.shape[2])


def _alternating(gates: np.ndarray, ups: np.ndarray) -> np.ndarray:
    """The rows of both, [E, F, ...] each, in turn."""
    return np.stack([gates, ups], axis=2).reshape(len(gates), 2 * gates.shape[1], *gates.shape[2:])
