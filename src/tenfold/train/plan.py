"""What a training step would take on a mesh, found without its devices: the real step is compiled, and nothing is run.

The mesh is of as many virtual devices of this machine's CPU. The compiler divides the program for one device of the
mesh, whichever it is; so a plan for thousands takes the time of one compilation, and the memory of none of the weights.
What accelerators do differently: they fuse more, which lowers what activations take, and reduce and scatter in one
where a CPU reduces and then drops the rest.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from tenfold.base.errors import ConfigError
from tenfold.nn.param import Tree
from tenfold.parallel.collectives import collectives
from tenfold.parallel.layout import Layout
from tenfold.parallel.schedule import Schedule
from tenfold.parallel.timetable import Work, make_timetable
from tenfold.train.state import TrainState
from tenfold.train.step import Step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each device of a mesh holds and sends in one step.

    Attributes:
        mesh: the axes and their sizes.
        weights, frozen: bytes of trained weights and of others.
        gradients: bytes of their sums.
        optimizer: bytes of what the optimizer keeps.
        activations: bytes of all that a step holds besides: activations, gathered weights, parts of gradients.
        traffic: bytes of the results of collectives, by their kind and the axes along which they go.
        bubble: the share of a step in which a device of the pipeline waits.
    """

    mesh: dict[str, int]
    weights: int
    frozen: int
    gradients: int
    optimizer: int
    activations: int
    traffic: dict[tuple[str, tuple[str, ...]], float]
    bubble: float

    def __str__(self) -> str:
        """A table, for people."""
        shape = " · ".join(f"{axis}={size}" for axis, size in self.mesh.items()) or "one device"
        held = {name: getattr(self, name) for name in ("weights", "frozen", "gradients", "optimizer", "activations")}
        lines = [f"{math.prod(self.mesh.values()):,} devices: {shape}", "", "each holds"]
        lines += [f"  {name:<42}{_size(size)}" for name, size in (*held.items(), ("together", sum(held.values())))]
        lines += ["", "and sends, in one step"]
        for (kind, axes), nbytes in sorted(self.traffic.items(), key=lambda item: -item[1]):
            lines.append(f"  {kind + ' along ' + ' · '.join(axes):<42}{_size(nbytes)}")
        if "pipeline" in self.mesh:
            lines += ["", f"It waits for {self.bubble:.1%} of the step for other stages of the pipeline."]
        return "\n".join(lines)


def use_virtual_devices(count: int) -> None:
    """Makes this process see as many virtual CPU devices and no others; to be called before jax is used.

    Raises:
        ConfigError: if jax has been used, and so found its devices.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise ConfigError(
            "a plan needs a process of its own: jax has already looked for devices in this one"
        ) from error
    jax.config.update("jax_platforms", "cpu")


def plan_step(
    step: Step, state: TrainState, frozen: Tree, batch: Any, layout: Layout, schedule: Schedule | None = None
) -> Plan:
    """Compiles a step, and reads from the program what it holds and sends.

    Args:
        step: the real one.
        state, frozen, batch: `jax.ShapeDtypeStruct`s with shardings: `state.abstract_state` makes the first.
        layout: of the mesh.
        schedule: of the pipeline, if there is one.
    """
    mesh = {} if layout.mesh is None else dict(layout.mesh.shape)
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    gradients = _held(jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, np.float32, sharding=w.sharding), state[1]))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    traffic: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for collective in collectives(text, mesh, _shares_of_work(schedule)):
        traffic[collective.kind, collective.axes] += int(collective.nbytes * collective.times)
    return Plan(
        mesh=mesh,
        weights=_held(state.trainable),
        frozen=_held(frozen),
        gradients=gradients,
        optimizer=_held(state.opt_state),
        activations=max(0, memory.temp_size_in_bytes - gradients),
        traffic=dict(traffic),
        bubble=schedule.bubble if schedule else 0.0,
    )


def _held(tree: Tree) -> int:
    """The bytes of a tree on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _shares_of_work(schedule: Schedule | None) -> list[float] | None:
    """In what share of a pipeline's ticks a device does each kind of work."""
    if schedule is None:
        return None
    work = make_timetable(schedule).work
    return [float((work == kind).mean()) for kind in Work]


def _size(nbytes: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    power = min(len(units) - 1, int(math.log(max(nbytes, 1), 1000)))
    return f"{nbytes / 1000**power:>8.1f} {units[power]}"
