"""The schedules of a pipeline: which stage computes what, and when. Plain Python: nothing here touches a device.

A stage is a share of the layers. A device has one, or with interleaving several: of V · P stages, device d has the
stages d, P + d, 2P + d, ... A schedule is, for each device, the order of its forward and backward passes. `place` puts
these on a common clock, a tick for each pass; `simulate` runs them with durations, as devices that wait for nothing but
what they are sent.

    gpipe          all forwards, then all backwards (Huang et al., 2019): the inputs of M micro-batches are held
    1f1b           a backward as soon as there is one (Narayanan et al., 2019; Fan et al., 2021): those of P
    interleaved    1f1b over V shorter stages of each device (Narayanan et al., 2021): a bubble V times smaller

Dims: P devices, M micro-batches, V stages of a device.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tenfold.base.errors import ConfigError

SCHEDULES = ("gpipe", "1f1b", "interleaved")


class Pass(NamedTuple):
    """A forward or backward pass of a micro-batch through a stage."""

    forward: bool
    stage: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What every device does.

    Attributes:
        name: of the schedule.
        devices: P.
        micro_batches: M.
        stages: V, of each device.
        orders: for each device its passes, in order.
    """

    name: str
    devices: int
    micro_batches: int
    stages: int
    orders: tuple[tuple[Pass, ...], ...]

    @property
    def last(self) -> int:
        """The stage that ends the model."""
        return self.devices * self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its time that a device waits, by the papers' formula: (P - 1) / (V · M + P - 1)."""
        return (self.devices - 1) / (self.stages * self.micro_batches + self.devices - 1)

    def needs(self, p: Pass) -> Pass | None:
        """The pass that gives this one its input; None for what reads tokens."""
        if p.forward:
            return Pass(True, p.stage - 1, p.micro_batch) if p.stage else None
        return Pass(False, p.stage + 1, p.micro_batch) if p.stage < self.last else Pass(True, p.stage, p.micro_batch)


def make_schedule(name: str, devices: int, micro_batches: int, stages: int = 1) -> Schedule:
    """The schedule of that name.

    Args:
        name: as above.
        devices: P, the size of the pipeline's axis.
        micro_batches: M.
        stages: V, of each device; more than 1 for "interleaved" only.

    Raises:
        ConfigError: if the numbers do not fit the schedule.
    """
    if name not in SCHEDULES:
        raise ConfigError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}")
    if (stages > 1) != (name == "interleaved") or stages < 1:
        raise ConfigError(
            f"{stages} stages of a device do not go with the schedule {name!r}: "
            "interleaved takes two or more, the others one"
        )
    if name == "interleaved" and micro_batches % devices:
        raise ConfigError(
            f"the interleaved schedule goes round {devices} devices with as many micro-batches at a time: "
            f"{micro_batches} is not a multiple of {devices}"
        )
    orders = tuple(_order(name, d, devices, micro_batches, stages) for d in range(devices))
    return Schedule(name=name, devices=devices, micro_batches=micro_batches, stages=stages, orders=orders)


def _order(name: str, d: int, P: int, M: int, V: int) -> tuple[Pass, ...]:
    """Of device d: some forwards to warm up, then one of each by turns, then the remaining backwards."""
    if name == "gpipe":
        warm_up = M
    elif name == "1f1b":
        warm_up = min(M, P - d)
    else:
        warm_up = min(M * V, 2 * (P - d - 1) + (V - 1) * P + 1)
    # Micro-batches go in groups of P through one stage of the device after the other.
    group = P if name == "interleaved" else M
    turns = [(g, v, i) for g in range(0, M, group) for v in range(V) for i in range(g, g + group)]
    forwards = [Pass(True, v * P + d, i) for _, v, i in turns]
    backwards = [Pass(False, (V - 1 - v) * P + d, i) for _, v, i in turns]
    steady = itertools.chain.from_iterable(zip(backwards, forwards[warm_up:], strict=False))
    return (*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :])


def place(schedule: Schedule) -> list[list[Pass | None]]:
    """Each tick's pass of each device, None where it waits: as early as its order and what it needs allow."""
    done: dict[Pass, int] = {}
    ticks: list[list[Pass | None]] = []
    heads = [0] * schedule.devices
    while any(head < len(order) for head, order in zip(heads, schedule.orders, strict=True)):
        tick: list[Pass | None] = [None] * schedule.devices
        for d, order in enumerate(schedule.orders):
            if heads[d] < len(order) and _ready(schedule, order[heads[d]], done, len(ticks)):
                tick[d] = order[heads[d]]
        for d, p in enumerate(tick):
            if p is not None:
                done[p] = len(ticks)
                heads[d] += 1
        assert any(tick), "a schedule in which every device waits for another"
        ticks.append(tick)
    return ticks


def _ready(schedule: Schedule, p: Pass, done: dict[Pass, int], now: int) -> bool:
    needed = schedule.needs(p)
    return needed is None or done.get(needed, now) < now


class Simulation(NamedTuple):
    """What a run of a schedule took.

    Attributes:
        time: until the last pass ended.
        bubble: the share of the devices' time in which they waited.
        held: for each device the most stage inputs that it held at once, from their forward to their backward pass.
    """

    time: float
    bubble: float
    held: tuple[int, ...]


def simulate(schedule: Schedule, forward: float = 1.0, backward: float = 2.0) -> Simulation:
    """Runs a schedule on devices that start a pass as soon as the one before it is done and its input has come.

    Args:
        schedule: what to run.
        forward, backward: how long a pass through a stage takes.
    """
    ends: dict[Pass, float] = {}
    free = [0.0] * schedule.devices
    queues = [list(order) for order in schedule.orders]
    while any(queues):
        for d, queue in enumerate(queues):
            while queue and ((needed := schedule.needs(queue[0])) is None or needed in ends):
                begin = max(free[d], 0.0 if needed is None else ends[needed])
                p = queue.pop(0)
                free[d] = ends[p] = begin + (forward if p.forward else backward)
    time = max(free)
    busy = schedule.micro_batches * schedule.stages * (forward + backward)
    return Simulation(time, 1 - busy / time, tuple(map(_most_held, schedule.orders)))


def _most_held(order: Sequence[Pass]) -> int:
    return max(itertools.accumulate(1 if p.forward else -1 for p in order))
