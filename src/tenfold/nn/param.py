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
from jax.sharding import AbstractMesh, Mesh
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
        axes: one logical axis name per dim ("embed heads head_dim"); `tenfold.parallel` maps them to mesh axes. A
            leading "experts" makes the weight one of each expert.
        sources: where it stands: one `Source` for each index of its leading `stack_dims` dims, the last one varying
            fastest; one where there are none.
        stack_dims: how many leading dims are stacked out of several tensors: of layers ("layers", for training), of
            experts where each has tensors of its own, or of both.
        init: the distribution at initialisation.
        scale: standard deviation of "normal".
        inputs: names of the axes that a product with activations contracts ("heads head_dim"): what makes the weight a
            matrix, or one for each expert, which may be quantised or repacked. Empty for all other weights.
    """

    shape: tuple[int, ...]
    axes: str
    sources: tuple[Source, ...]
    stack_dims: int = 0
    init: Initializer = "normal"
    scale: float = 0.02
    inputs: str = ""

    def __post_init__(self) -> None:
        if len(self.axes.split()) != len(self.shape):
            raise ValueError(f"{self.sources[0].name}: axes {self.axes!r} do not name the dims {self.shape}")
        if len(self.sources) != math.prod(self.stack_shape) or (self.stacked and not self.stack_dims):
            found, dims = f"{len(self.sources)} sources for the shape {self.shape}", self.stack_dims
            raise ValueError(f"{self.sources[0].name}: {found}, of which {dims} dims are stacked")
        for source in self.sources:
            if source.layout is not None:
                check_layout(source.layout, self.source_shape)
            part = self.checkpoint_shape(source)
            if source.rows is not None and source.rows[1] - source.rows[0] != part[0]:
                raise ValueError(f"{source.name}: rows {source.rows} do not hold a tensor of shape {part}")

    @property
    def stacked(self) -> bool:
        """Whether several layers are stacked, as training has them."""
        return self.axes.split()[:1] == ["layers"]

    @property
    def experts(self) -> int | None:
        """Of how many experts this is a weight of each; None if it is not."""
        names = self.axes.split()[self.stacked :]
        return self.shape[self.stacked] if names[:1] == ["experts"] else None

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """The dims that are stacked out of the sources."""
        return self.shape[: self.stack_dims]

    @property
    def source_shape(self) -> tuple[int, ...]:
        """The shape of what one source holds, with the model's dims."""
        return self.shape[self.stack_dims :]

    @property
    def matrix_dims(self) -> tuple[list[int], list[int], list[int]]:
        """Which dims count matrices, which are their inputs, and which their outputs."""
        names = self.axes.split()
        batch = self.stacked + (self.experts is not None)
        inputs = [names.index(name, batch) for name in self.inputs.split()]
        return list(range(batch)), inputs, [i for i in range(batch, len(names)) if i not in inputs]

    @property
    def input_size(self) -> int:
        """How many inputs a product with this weight, or with one expert's, has."""
        return math.prod(self.shape[i] for i in self.matrix_dims[1])

    @property
    def output_dims(self) -> tuple[int, ...]:
        """The dims of what a product with this weight, or with one expert's, gives."""
        return tuple(self.shape[i] for i in self.matrix_dims[2])

    @property
    def routes(self) -> bool:
        """Whether the products with this weight choose experts: it is small, and never rounded unless stored so."""
        return "experts" in [self.axes.split()[i] for i in self.matrix_dims[2]]

    def as_matrix(self, array: jax.Array) -> jax.Array:
        """A weight as [inputs, outputs], with leading dims of stacked layers and of experts where it has them."""
        batch, inputs, outputs = self.matrix_dims
        return array.transpose(*batch, *inputs, *outputs).reshape(*array.shape[: len(batch)], self.input_size, -1)

    def checkpoint_shape(self, source: Source) -> tuple[int, ...]:
        """The shape that a source's weight has in the checkpoint; of a fused tensor, the shape of its own rows."""
        return checkpoint_shape(source.layout, self.source_shape)


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


def device_nbytes(tree: Tree, dtype: DTypeLike, mesh: Mesh | AbstractMesh, rules: ShardingRules = DEFAULT_RULES) -> int:
    """The bytes of a declaration tree in `dtype` that each device of a mesh holds; the mesh may be abstract.

    Raises ConfigError where the rules do not fit the declaration.
    """
    shards = (named_sharding(p.axes, p.shape, mesh, rules).shard_shape(p.shape) for _, p in leaves(tree))
    return sum(map(math.prod, shards)) * jnp.dtype(dtype).itemsize


def stack(params: Sequence[Param], axis: str = "layers") -> Param:
    """One parameter with a new leading dim out of the same parameter of several layers, or of several "experts"."""
    first = params[0]
    return replace(
        first,
        shape=(len(params), *first.shape),
        axes=f"{axis} {first.axes}",
        sources=tuple(source for p in params for source in p.sources),
        stack_dims=first.stack_dims + 1,
    )


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
        draw = _draw_program(p.stack_shape, p.source_shape, p.init, p.scale, jnp.dtype(dtype), sharding)
        arrays.append(draw(_source_keys(key, np.asarray(ids, np.uint32))))
    return treedef.unflatten(arrays)


@jax.jit
def _source_keys(key: jax.Array, ids: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)


@functools.cache
def _draw_program(
    stack_shape: tuple[int, ...],
    source_shape: tuple[int, ...],
    init: Initializer,
    scale: float,
    dtype: np.dtype,
    sharding: Any,
) -> Callable[[jax.Array], jax.Array]:
    # The numbers are the same either way. Flat ones compile many times faster; shaped ones are made where they belong.
    drawn_shape = (math.prod(source_shape),) if sharding is None else source_shape

    def draw_source(source_key: jax.Array) -> jax.Array:
        if init == "normal":
            normal = jax.random.normal(source_key, drawn_shape, jnp.float32)
            return (scale * normal).astype(dtype).reshape(source_shape)
        return jnp.full(source_shape, 1 if init == "ones" else 0, dtype)

    def draw(keys: jax.Array) -> jax.Array:
        if not stack_shape:
            return draw_source(keys[0])
        return jax.lax.map(draw_source, keys).reshape(*stack_shape, *source_shape)

    return jax.jit(draw, out_shardings=sharding)


def abstract(tree: Tree, dtype: DTypeLike) -> Tree:
    """The tree as `jax.ShapeDtypeStruct`s: what a program is lowered with when no memory may be used."""
    return map_params(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(dtype)), tree)


def shardings(tree: Tree, mesh: jax.sharding.Mesh, rules: ShardingRules = DEFAULT_RULES) -> Tree:
    """How a declaration tree lies on a mesh: a matching pytree of shardings, for `initialize` and `checkpoint.load`.

    Raises ConfigError where the rules do not fit the declaration.
    """
    return map_params(lambda p: named_sharding(p.axes, p.shape, mesh, rules), tree)
