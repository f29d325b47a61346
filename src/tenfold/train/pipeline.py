"""The gradient of a loss whose layers are shared out over the stages of a pipeline.

One program runs on all devices in step. At every tick of a timetable a device makes one pass of a micro-batch through
one of its stages, or none, and then all hand on what they made: activations to the next device, gradients to the one
before. A backward pass computes its stage again from what the stage received, which is all that is kept of a forward
pass. The pipeline's axis is this module's to manage; the compiler divides the work within a stage as ever.

The first stage reads tokens, and the last one computes the loss. Weights outside the layers are on all devices of the
axis, and what each device finds of their gradient is added up at the end.

Dims: P devices, V stages of a device, M micro-batches, n repetitions of the layers' pattern in a stage, T tokens of a
micro-batch, D model width.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tenfold.base.errors import ConfigError
from tenfold.nn.param import Tree
from tenfold.nn.stack import Placement
from tenfold.parallel.layout import Layout, current
from tenfold.parallel.schedule import Schedule
from tenfold.parallel.timetable import Timetable, Work, make_timetable
from tenfold.train.loss import LossSum, StagedLoss
from tenfold.train.step import Grad, deal

AXIS = "pipeline"


class _Given(NamedTuple):
    """What a device works with in one tick.

    Attributes:
        trainable, frozen: both trees, with the layers of one stage only.
        batch: one micro-batch.
        x: what the stage received.
        to_y: the gradient of what it passed on.
    """

    trainable: Tree
    frozen: Tree
    batch: Any
    x: Float[Array, "T D"]
    to_y: Float[Array, "T D"]


class _Made(NamedTuple):
    """What came of a tick; zeros where there is none.

    Attributes:
        y: for the next stage.
        to_x: the gradient of what the stage received, for the one before.
        sums: of the last stage.
        gradients: of the trained weights that the stage has, in float32.
    """

    y: Float[Array, "T D"]
    to_x: Float[Array, "T D"]
    sums: LossSum
    gradients: Tree


def pipelined(
    loss: StagedLoss, schedule: Schedule, placement: Placement, shardings: Tree = None, frozen_shardings: Tree = None
) -> Grad:
    """The gradient of a loss over the "pipeline" axis of the placement's mesh, micro-batch by micro-batch.

    Args:
        loss: what to differentiate.
        schedule: over as many devices as the axis has.
        placement: of the activations within a stage.
        shardings: of the trained weights, which the sums of their gradients are spread like; None leaves that open.
        frozen_shardings: of the others; None likewise.

    Raises:
        ConfigError: if the mesh has no such axis; and when the gradient is traced, if the layers do not divide over the
            stages.
    """
    layout = placement.layout
    if layout.mesh is None or layout.size(AXIS) != schedule.devices or schedule.last == 0:
        raise ConfigError(f"a schedule of {schedule.devices} devices needs a mesh with {AXIS}={schedule.devices}")
    mesh, table = layout.mesh, make_timetable(schedule)

    def grad(trainable: Tree, frozen: Tree, batch: Any) -> tuple[LossSum, Tree]:
        gather = functools.partial(_gathered, layout)
        if shardings is not None:
            trainable = _map_leaves(_same, gather, trainable, shardings)
        if frozen_shardings is not None:
            frozen = _map_leaves(_same, gather, frozen, frozen_shardings)
        specs = [
            _map_leaves(lambda _: PartitionSpec(None, AXIS), lambda _: PartitionSpec(), tree)
            for tree in (trainable, frozen)
        ]
        staged = [_map_leaves(lambda w: _to_stages(w, schedule), _same, tree) for tree in (trainable, frozen)]
        on_devices = jax.shard_map(
            _Program(loss, schedule, table, placement, shardings).run,
            mesh=current(mesh),
            in_specs=(*specs, PartitionSpec(), PartitionSpec(None, AXIS)),
            out_specs=(PartitionSpec(), specs[0]),
            axis_names={AXIS},
            check_vma=False,  # models start their loops with constants, which vary over no axis
        )
        parts = jax.tree.map(lambda x: deal(x, schedule.micro_batches), batch)
        sums, gradients = on_devices(staged[0], staged[1], parts, jax.tree.map(jnp.asarray, table))
        return sums, _map_leaves(lambda g: g.reshape(-1, *g.shape[3:]), _same, gradients)

    return grad


@dataclass(frozen=True)
class _Program:
    """What every device runs; stacked weights are those of its own stages, [V, 1, n, ...]."""

    loss: StagedLoss
    schedule: Schedule
    table: Timetable
    placement: Placement
    shardings: Tree

    def run(self, trainable: Tree, frozen: Tree, parts: Any, table: Any) -> tuple[LossSum, Tree]:
        """The sums over all micro-batches, and the gradients of the device's stages.

        `table` is the device's own column of the timetable: [ticks, 1].
        """
        trainable, frozen = (_map_leaves(lambda w: w[:, 0], _same, tree) for tree in (trainable, frozen))
        onward = [(d, (d + 1) % self.schedule.devices) for d in range(self.schedule.devices)]
        back = [(to, source) for source, to in onward]

        def tick(carry: Any, now: Timetable) -> tuple[Any, None]:
            (inputs, to_outputs), summed = carry
            stage = now.stage[0]
            given = _Given(
                _stage_of(trainable, stage),
                _stage_of(frozen, stage),
                jax.tree.map(lambda part: _read(part, now.micro_batch[0]), parts),
                _read(inputs, now.input_slot[0]),
                _read(to_outputs, now.gradient_slot[0]),
            )
            made = jax.lax.switch(now.work[0], [functools.partial(self._work, work) for work in Work], given)
            inputs = _write(inputs, now.input_arrives[0], jax.lax.ppermute(made.y, AXIS, onward))
            to_outputs = _write(to_outputs, now.gradient_arrives[0], jax.lax.ppermute(made.to_x, AXIS, back))
            return ((inputs, to_outputs), self._add(summed, made, stage)), None

        (_, (sums, gradients)), _ = jax.lax.scan(tick, self._start(trainable, frozen, parts), table)
        shared = functools.partial(jax.lax.psum, axis_name=AXIS)
        return shared(sums), _map_leaves(lambda g: g[:, None], shared, gradients)

    def _start(self, trainable: Tree, frozen: Tree, parts: Any) -> Any:
        """Empty slots, of which one more than are used takes what nobody needs, and sums of zero."""
        layout = self.placement.layout
        given = _stage_of(trainable, 0), _stage_of(frozen, 0), jax.tree.map(lambda part: part[0], parts)

        def made_by(part: Callable[[Tree, Tree, Any, Placement], Any]) -> Any:
            return jax.eval_shape(lambda t, f, batch: part(t, f, batch, self._at(None)), *given)

        activation, sums = made_by(self.loss.pass_on), made_by(self.loss.sums)
        slots = [
            layout.constrain(jnp.zeros((n + 1, *activation.shape), activation.dtype), None, layout.token_axes, None)
            for n in (self.table.input_slots, self.table.gradient_slots)
        ]
        gradients = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), trainable)
        return tuple(slots), (jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums), self._spread(gradients))

    def _at(self, received: jax.Array | None) -> Placement:
        return replace(self.placement, stage=True, received=received)

    def _work(self, work: Work, given: _Given) -> _Made:
        """One pass, or none."""
        trainable, frozen, batch, x, to_y = given
        first, last = work in (Work.FORWARD_FIRST, Work.BACKWARD_FIRST), work == Work.BACKWARD_LAST

        def pass_on(trainable: Tree, x: jax.Array) -> jax.Array:
            return self.loss.pass_on(trainable, frozen, batch, self._at(None if first else x))

        def total(trainable: Tree, x: jax.Array) -> tuple[jax.Array, LossSum]:
            sums = self.loss.sums(trainable, frozen, batch, self._at(x))
            return sums.total, sums

        made = self._nothing(given)
        if work in (Work.FORWARD_FIRST, Work.FORWARD):
            return made._replace(y=pass_on(trainable, x))
        if work == Work.NOTHING:
            return made
        if last:
            (gradients, to_x), sums = jax.grad(total, argnums=(0, 1), has_aux=True)(trainable, x)
            made = made._replace(sums=sums)
        else:
            gradients, to_x = jax.vjp(pass_on, trainable, x)[1](to_y)
        if self.shardings is not None:  # else the sums' shards become those of the scatter to the embedding
            gather = functools.partial(_gathered, self.placement.layout)
            gradients = _map_leaves(_same, gather, gradients, self.shardings)
        return made._replace(to_x=to_x, gradients=_in_float32(gradients))

    def _nothing(self, given: _Given) -> _Made:
        trainable, frozen, batch, x, to_y = given
        sums = jax.eval_shape(lambda: self.loss.sums(trainable, frozen, batch, self._at(x)))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), sums)
        return _Made(
            jnp.zeros_like(x), jnp.zeros_like(to_y), zeros, _in_float32(jax.tree.map(jnp.zeros_like, trainable))
        )

    def _add(self, summed: tuple[LossSum, Tree], made: _Made, stage: jax.Array) -> tuple[LossSum, Tree]:
        sums, gradients = summed
        gradients = _map_leaves(lambda g, more: g.at[stage].add(more), jnp.add, gradients, made.gradients)
        return jax.tree.map(jnp.add, sums, made.sums), self._spread(gradients)

    def _spread(self, gradients: Tree) -> Tree:
        """The sums of gradients, spread like the weights, of whose first dim this device has its part already."""
        if self.shardings is None:
            return gradients
        mesh = current(cast(Mesh, self.placement.layout.mesh))

        def within(g: jax.Array, spec: Iterable[Any]) -> jax.Array:
            return jax.lax.with_sharding_constraint(g, NamedSharding(mesh, PartitionSpec(*spec)))

        return _map_leaves(
            lambda g, s: within(g, (None, None, *s.spec[1:])), lambda g, s: within(g, s.spec), gradients, self.shardings
        )


# --- trees of which some leaves are stacked layers ------------------------------------------------------------------


def _map_leaves(stacked: Callable[..., Any], other: Callable[..., Any], tree: Tree, *more: Tree) -> Tree:
    """One function of the weights of stacked layers, and another of all others."""

    def apply(path: Any, *leaves: Any) -> Any:
        name = f".{jax.tree_util.keystr(path, simple=True, separator='.')}."
        return (stacked if ".layers.scan." in name else other)(*leaves)

    return jax.tree_util.tree_map_with_path(apply, tree, *more)


def _same(x: jax.Array, *_: Any) -> jax.Array:
    return x


def _gathered(layout: Layout, w: jax.Array, sharding: NamedSharding) -> jax.Array:
    """A weight outside the layers, or its gradient, in whole rows of what the axes of rows split: gathered once in a
    step, not in every tick. XLA cannot look up an embedding both of whose dims are split, where an axis is manual."""
    return layout.constrain(w, *(None if dim in layout.row_axes else dim for dim in sharding.spec))


def _to_stages(w: jax.Array, schedule: Schedule) -> jax.Array:
    """[V · P · n, ...] as [V, P, n, ...]: layers go through the devices V times."""
    if w.shape[0] % (schedule.last + 1):
        raise ConfigError(
            f"{w.shape[0]} repetitions of the model's pattern of layers do not divide over {schedule.last + 1} stages "
            f"of a pipeline: choose {AXIS}, or the stages of a device, so that they do"
        )
    return w.reshape(schedule.stages, schedule.devices, -1, *w.shape[1:])


def _stage_of(tree: Tree, stage: int | jax.Array) -> Tree:
    """With the layers of one of the device's stages."""
    return _map_leaves(lambda w: _read(w, stage), _same, tree)


def _in_float32(tree: Tree) -> Tree:
    return jax.tree.map(lambda g: g.astype(jnp.float32), tree)


def _read(slots: jax.Array, i: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(slots, i, keepdims=False)


def _write(slots: jax.Array, i: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(slots, x, i, 0)
