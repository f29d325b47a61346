"""What a run of training carries from step to step on its devices."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int32

from tenfold.nn.param import Tree


class TrainState(NamedTuple):
    """The trained weights and what their optimizer knows of them.

    Attributes:
        step: how many steps of the optimizer made it.
        trainable: the weights, or the adapters, that are trained; float32.
        opt_state: what optax keeps.
    """

    step: Int32[Array, ""]
    trainable: Tree
    opt_state: Any


def init_state(optimizer: optax.GradientTransformation, trainable: Tree, shardings: Tree = None) -> TrainState:
    """The state before the first step, its arrays where `shardings`, those of the trained weights, put them."""

    def init(trainable: Tree) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))

    where = None if shardings is None else state_shardings(optimizer, trainable, shardings)
    return jax.jit(init, out_shardings=where)(trainable)


def abstract_state(optimizer: optax.GradientTransformation, trainable: Tree, shardings: Tree = None) -> TrainState:
    """The state's shapes, dtypes and shardings: what a step is lowered for, and a checkpoint restored to.

    Args:
        optimizer: that trains.
        trainable: arrays or their `jax.ShapeDtypeStruct`s.
        shardings: of `trainable`; None leaves them open.
    """
    state = jax.eval_shape(
        lambda trainable: TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable)), trainable
    )
    if shardings is None:
        return state
    where = state_shardings(optimizer, trainable, shardings)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def state_shardings(optimizer: optax.GradientTransformation, trainable: Tree, shardings: Tree) -> TrainState:
    """How the state lies on a mesh: what the optimizer keeps of a weight lies like the weight, if shaped like it.

    What it keeps of a weight has the weight's path at the end of its own.
    """
    weights = jax.tree_util.tree_leaves_with_path(trainable)
    placed = jax.tree.leaves(shardings)
    like = {path: (w.shape, sharding) for (path, w), sharding in zip(weights, placed, strict=True)}
    whole: Any = NamedSharding(placed[0].mesh, PartitionSpec())

    def place(path: tuple[Any, ...], kept: Any) -> Any:
        ends = (like.get(path[start:]) for start in range(len(path) + 1))
        return next((sharding for shape, sharding in filter(None, ends) if shape == kept.shape), whole)

    kept = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, trainable))
    return TrainState(whole, shardings, kept)
