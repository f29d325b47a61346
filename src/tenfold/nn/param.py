"""One declaration per parameter.

A model family describes its weights as a pytree of `Param`s. From that one tree come initialisation, sharding,
loading from and exporting to Hugging Face checkpoints, and the memory estimate.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tenfold.nn.layout import check_layout, checkpoint_shape
from tenfold.parallel.sharding import DEFAULT_RULES, ShardingRules, named_sharding

Tree = Any
Initializer = Literal["normal", "ones", "zeros"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a parameter stands in a Hugging Face checkpoint.

    Attributes:
        name: the tensor's full name, e.g. "model.layers.3.self_attn.q_proj.weight".
        layout: einops pattern from the checkpoint's dims to ours, e.g. "(H K) D -> D H K"; a bijection, so that it
            exports too. None leaves the tensor as it is.
        rows: [start, stop) of the tensor's first dim where several parameters share one fused tensor, else None.
        aliases: further names under which a checkpoint may have this tensor instead, or repeat it (tied weights); never
            exported.
    """

    name: str
    layout: str | None = None
    rows: tuple[int, int] | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Param:
    """The declaration of one weight.

    Attributes:
        shape: dims as the model uses them.
        axes: one logical axis name per dim ("embed heads head_dim"); `tenfold.parallel` maps them to mesh axes.
        sources: one `Source`, or one per layer when the parameter is stacked along a leading "layers" dim.
        init: the distribution at initialisation.
        scale: standard deviation of "normal".
        inputs: names of the axes that a product with activations contracts ("heads head_dim"): what makes the weight a
            matrix, which may be quantised or repacked. Empty for all other weights.
    """

    shape: tuple[int, ...]
    axes: str
    sources: tuple[Source, ...]
    init: Initializer = "normal"
    scale: float = 0.02
    inputs: str = ""

    def __post_init__(self) -> None:
        if len(self.axes.split()) != len(self.shape):
            raise ValueError(f"{self.sources[0].name}: axes {self.axes!r} do not name the dims {self.shape}")
        if len(self.sources) != (self.shape[0] if self.stacked else 1):
            raise ValueError(f"{self.sources[0].name}: {len(self.sources)} sources for the shape {self.shape}")
        for source in self.sources:
            if source.layout is not None:
                check_layout(source.layout, self.layer_shape)
            part = self.checkpoint_shape(source)
            if source.rows is not None and source.rows[1] - source.rows[0] != part[0]:
                raise ValueError(f"{source.name}: rows {source.rows} do not hold a tensor of shape {part}")

    @property
    def stacked(self) -> bool:
        return self.axes.startswith("layers ") or self.axes == "layers"

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer's weight: without the leading "layers" dim of a stacked parameter."""
        return self.shape[1:] if self.stacked else self.shape

    def _matrix_dims(self) -> tuple[list[int], list[int]]:
        """Which dims of a layer's weight are inputs, and which are outputs."""
        names = self.axes.removeprefix("layers ").split()
        inputs = [names.index(name) for name in self.inputs.split()]
        return inputs, [i for i in range(len(names)) if i not in inputs]

    @property
    def output_dims(self) -> tuple[int, ...]:
        """The dims of what a product with this weight gives."""
        return tuple(self.layer_shape[i] for i in self._matrix_dims()[1])

    def as_matrix(self, array: jax.Array) -> jax.Array:
        """One layer's weight as [inputs, outputs]."""
        inputs, outputs = self._matrix_dims()
        return array.transpose(*inputs, *outputs).reshape(math.prod(self.layer_shape[i] for i in inputs), -1)

    def checkpoint_shape(self, source: Source) -> tuple[int, ...]:
        """The shape that one layer's weight has in the checkpoint; of a fused tensor, the shape of its own rows."""
        return checkpoint_shape(source.layout, self.layer_shape)


def param(
    shape: tuple[int, ...],
    axes: str,
    hf: str,
    layout: str | None = None,
    *,
    rows: tuple[int, int] | None = None,
    aliases: tuple[str, ...] = (),
    init: Initializer = "normal",
    scale: float = 0.02,
    inputs: str = "",
) -> Param:
    """Declares a weight in one line: shape, logical axes, checkpoint name and layout."""
    source = Source(name=hf, layout=layout, rows=rows, aliases=aliases)
    return Param(shape=shape, axes=axes, sources=(source,), init=init, scale=scale, inputs=inputs)


def is_param(x: object) -> bool:
    """True for the leaves of a declaration tree."""
    return isinstance(x, Param)


def leaves(tree: Tree) -> Iterator[tuple[str, Param]]:
    """Yields (path, Param) for every parameter of a declaration tree, in pytree order."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param):
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def map_params(fn: Callable[[Param], Any], tree: Tree) -> Tree:
    """Applies `fn` to every `Param` of a tree."""
    return jax.tree.map(fn, tree, is_leaf=is_param)


def also_named(tree: Tree, prefixes: Mapping[str, Sequence[str]]) -> Tree:
    """The declaration with names that checkpoints may have instead: {"transformer.": ("",)} says that a tensor may be
    named without its "transformer."."""

    def widen(source: Source) -> Source:
        names = (source.name, *source.aliases)
        found = [(name, prefix) for name in names for prefix in prefixes if name.startswith(prefix)]
        others = (other + name.removeprefix(prefix) for name, prefix in found for other in prefixes[prefix])
        return replace(source, aliases=(*source.aliases, *others))

    return map_params(lambda p: replace(p, sources=tuple(map(widen, p.sources))), tree)


def count(tree: Tree) -> int:
    """The number of weights in a declaration tree."""
    return sum(math.prod(p.shape) for _, p in leaves(tree))


def nbytes(tree: Tree, dtype: DTypeLike) -> int:
    """The bytes that a declaration tree takes in `dtype`."""
    return count(tree) * jnp.dtype(dtype).itemsize


def stack(params: Sequence[Param]) -> Param:
    """One parameter with a leading "layers" dim out of the same parameter of several layers."""
    first = params[0]
    sources = tuple(source for p in params for source in p.sources)
    return replace(first, shape=(len(params), *first.shape), axes=f"layers {first.axes}", sources=sources)


def initialize(tree: Tree, key: jax.Array, dtype: DTypeLike, shardings: Tree = None) -> Tree:
    """Random weights for a declaration tree, made directly on the devices that will hold them.

    A parameter's values depend on the key and on its checkpoint names alone, so a stacked and an unstacked declaration
    of the same model start equal, on any mesh. Parameters of one shape share one compiled program.

    Args:
        tree: a pytree of `Param`.
        key: a typed PRNG key.
        dtype: of the arrays returned.
        shardings: a matching pytree of shardings, or None for the default device.
    """
    params, treedef = jax.tree.flatten(tree, is_leaf=is_param)
    targets = [None] * len(params) if shardings is None else treedef.flatten_up_to(shardings)
    arrays: list[jax.Array] = []
    for p, sharding in zip(params, targets, strict=True):
        ids = [zlib.crc32(f"{source.name}{source.rows or ''}".encode()) for source in p.sources]
        draw = _draw_program(p.layer_shape, p.stacked, p.init, p.scale, jnp.dtype(dtype), sharding)
        arrays.append(draw(_layer_keys(key, np.asarray(ids, np.uint32))))
    return treedef.unflatten(arrays)


@jax.jit
def _layer_keys(key: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)


@functools.cache
def _draw_program(
    layer_shape: tuple[int, ...], stacked: bool, init: Initializer, scale: float, dtype: np.dtype, sharding: Any
) -> Callable[[jax.Array], jax.Array]:
    # The numbers are the same either way. Flat ones compile many times faster; shaped ones are made where they belong.
    drawn_shape = (math.prod(layer_shape),) if sharding is None else layer_shape

    def draw_layer(layer_key: jax.Array) -> jax.Array:
        if init == "normal":
            normal = jax.random.normal(layer_key, drawn_shape, jnp.float32)
            return (scale * normal).astype(dtype).reshape(layer_shape)
        return jnp.full(layer_shape, 1 if init == "ones" else 0, dtype)

    def draw(keys: jax.Array) -> jax.Array:
        return jax.lax.map(draw_layer, keys) if stacked else draw_layer(keys[0])

    return jax.jit(draw, out_shardings=sharding)


def abstract(tree: Tree, dtype: DTypeLike) -> Tree:
    """The tree as `jax.ShapeDtypeStruct`s: what a program is lowered with when no memory may be used."""
    return map_params(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), tree)


def shardings(tree: Tree, mesh: jax.sharding.Mesh, rules: ShardingRules = DEFAULT_RULES) -> Tree:
    """How a declaration tree lies on a mesh: a matching pytree of shardings, for `initialize` and `checkpoint.load`.

    Raises ConfigError where the rules do not fit the declaration.
    """
    return map_params(lambda p: named_sharding(p.axes, p.shape, mesh, rules), tree)
