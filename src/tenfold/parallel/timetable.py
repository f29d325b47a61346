"""A schedule as tables of numbers, which a device looks up at every tick: what to compute, and where its inputs lie.

Activations and gradients that arrive are kept in slots until the backward pass that needs them is done; a slot is used
again as soon as it is free. Nothing is kept of what no stage receives: the first one reads tokens.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np

from tenfold.parallel.schedule import Pass, Schedule, place


class Work(IntEnum):
    """What a device computes in a tick. The last stage's forward pass is part of its backward one."""

    NOTHING = 0
    FORWARD_FIRST = 1
    FORWARD = 2
    BACKWARD_FIRST = 3
    BACKWARD = 4
    BACKWARD_LAST = 5


class Timetable(NamedTuple):
    """int32 [ticks, devices]; slots that are not used are the one past the last.

    Attributes:
        work: which `Work`.
        micro_batch, stage: of which micro-batch; through which of the device's own stages.
        input_slot, gradient_slot: where the stage's input lies, and the gradient of what it passed on.
        input_arrives, gradient_arrives: where to put what the device is sent at the end of the tick.
    """

    work: np.ndarray
    micro_batch: np.ndarray
    stage: np.ndarray
    input_slot: np.ndarray
    gradient_slot: np.ndarray
    input_arrives: np.ndarray
    gradient_arrives: np.ndarray

    @property
    def input_slots(self) -> int:
        """How many stage inputs a device holds at most."""
        return int(self.input_slot.max())

    @property
    def gradient_slots(self) -> int:
        """How many gradients a device holds at most."""
        return int(self.gradient_slot.max())


def make_timetable(schedule: Schedule) -> Timetable:
    """The tables of a schedule."""
    ticks = place(schedule)
    when = {p: t for t, tick in enumerate(ticks) for p in tick if p is not None}
    inputs = _slots(schedule, when, forward=True)
    gradients = _slots(schedule, when, forward=False)
    shape = (len(ticks), schedule.devices)
    no_input, no_gradient = (max(slots.values(), default=-1) + 1 for slots in (inputs, gradients))
    table = Timetable(*(np.zeros(shape, np.int32) for _ in range(3)), *(np.zeros(shape, np.int32) for _ in range(4)))
    for slots, empty in ((table.input_slot, no_input), (table.input_arrives, no_input)):
        slots[:] = empty
    for slots, empty in ((table.gradient_slot, no_gradient), (table.gradient_arrives, no_gradient)):
        slots[:] = empty
    for p, t in when.items():
        at = t, p.stage % schedule.devices
        table.work[at] = _work(schedule, p)
        table.micro_batch[at], table.stage[at] = p.micro_batch, p.stage // schedule.devices
        table.input_slot[at] = inputs.get((p.stage, p.micro_batch), no_input)
        table.gradient_slot[at] = no_gradient if p.forward else gradients.get((p.stage, p.micro_batch), no_gradient)
        # What it makes arrives at the stage that needs it.
        to = p.stage + 1 if p.forward else p.stage - 1
        arrives, slots, empty = (
            (table.input_arrives, inputs, no_input) if p.forward else (table.gradient_arrives, gradients, no_gradient)
        )
        if 0 <= to <= schedule.last:
            arrives[t, to % schedule.devices] = slots.get((to, p.micro_batch), empty)
    return table


def _work(schedule: Schedule, p: Pass) -> Work:
    if p.stage == schedule.last:
        return Work.NOTHING if p.forward else Work.BACKWARD_LAST
    if p.stage == 0:
        return Work.FORWARD_FIRST if p.forward else Work.BACKWARD_FIRST
    return Work.FORWARD if p.forward else Work.BACKWARD


def _slots(schedule: Schedule, when: dict[Pass, int], *, forward: bool) -> dict[tuple[int, int], int]:
    """Where each stage's received input, or gradient, of each micro-batch lies: the lowest slot that is free."""
    slots: dict[tuple[int, int], int] = {}
    for d in range(schedule.devices):
        lives: list[tuple[int, int, tuple[int, int]]] = []
        for stage in range(d, schedule.last + 1, schedule.devices):
            for i in range(schedule.micro_batches):
                sender = Pass(forward, stage - 1 if forward else stage + 1, i)
                if sender in when:
                    lives.append((when[sender], when[Pass(False, stage, i)], (stage, i)))
        free: list[int] = []  # of each slot, since when it is
        for arrives, ends, key in sorted(lives):
            slot = next((s for s, since in enumerate(free) if since <= arrives), len(free))
            free[slot : slot + 1] = [ends]
            slots[key] = slot
    return slots
