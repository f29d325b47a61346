"""Schedules of pipelines: each pass once and in a possible order, and the bubbles and memories of their papers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.errors import ConfigError
from tenfold.parallel.schedule import Pass, make_schedule, place, simulate
from tenfold.parallel.timetable import Work, make_timetable

PLAIN = st.tuples(st.sampled_from(["gpipe", "1f1b"]), st.integers(2, 6), st.integers(1, 12), st.just(1))
INTERLEAVED = st.tuples(st.integers(2, 5), st.integers(1, 4), st.integers(2, 4)).map(
    lambda drawn: ("interleaved", drawn[0], drawn[0] * drawn[1], drawn[2])
)
SCHEDULES = PLAIN | INTERLEAVED
Arguments = tuple[str, int, int, int]


@given(SCHEDULES)
def test_every_pass_is_made_once_after_what_it_needs(arguments: Arguments) -> None:
    schedule = make_schedule(*arguments)
    when = {p: t for t, tick in enumerate(place(schedule)) for p in tick if p is not None}
    passes = [p for order in schedule.orders for p in order]
    everything = {
        Pass(forward, stage, i)
        for forward in (True, False)
        for stage in range(schedule.last + 1)
        for i in range(schedule.micro_batches)
    }
    assert len(passes) == len(everything)
    assert set(passes) == set(when) == everything
    for p, t in when.items():
        needed = schedule.needs(p)
        assert needed is None or when[needed] < t
        assert p in schedule.orders[p.stage % schedule.devices]


@given(SCHEDULES, st.floats(0.5, 3))
def test_the_bubble_is_that_of_the_formula(arguments: Arguments, backward: float) -> None:
    schedule = make_schedule(*arguments)
    if schedule.micro_batches < schedule.devices:
        return  # there the formula is of the papers no more
    V, M, P = schedule.stages, schedule.micro_batches, schedule.devices
    assert schedule.bubble == (P - 1) / (V * M + P - 1)
    assert simulate(schedule, 1.0, backward).bubble == pytest.approx(schedule.bubble, rel=0.05)


@given(SCHEDULES)
def test_as_many_inputs_are_held_as_the_papers_say(arguments: Arguments) -> None:
    schedule = make_schedule(*arguments)
    V, M, P = schedule.stages, schedule.micro_batches, schedule.devices
    most = {
        "gpipe": [M] * P,
        "1f1b": [min(M, P - d) for d in range(P)],
        "interleaved": [min(V * M, 2 * (P - 1 - d) + (V - 1) * P + 1) for d in range(P)],
    }[schedule.name]
    assert list(simulate(schedule).held) == most


@given(SCHEDULES)
def test_slots_hold_what_a_pass_needs_until_its_gradient_is_known(arguments: Arguments) -> None:
    """Follows the tables as a device does, with the names of activations in place of numbers."""
    schedule = make_schedule(*arguments)
    table = make_timetable(schedule)
    P, last = schedule.devices, schedule.last
    inputs = [["nothing"] * (table.input_slots + 1) for _ in range(P)]
    gradients = [["nothing"] * (table.gradient_slots + 1) for _ in range(P)]
    done = 0
    for t in range(len(table.work)):
        sent: list[tuple[str, str]] = []
        for d in range(P):
            work, i = Work(table.work[t, d]), table.micro_batch[t, d]
            stage = table.stage[t, d] * P + d
            x, to_y = inputs[d][table.input_slot[t, d]], gradients[d][table.gradient_slot[t, d]]
            if work in (Work.FORWARD, Work.BACKWARD, Work.BACKWARD_LAST):
                assert x == f"{i} into {stage}"
            if work in (Work.BACKWARD, Work.BACKWARD_FIRST):
                assert to_y == f"to {i} out of {stage}"
            assert (work in (Work.FORWARD_FIRST, Work.BACKWARD_FIRST)) == (stage == 0 and work != Work.NOTHING)
            assert (work == Work.BACKWARD_LAST) <= (stage == last)
            done += work in (Work.BACKWARD, Work.BACKWARD_FIRST, Work.BACKWARD_LAST)
            sent.append((f"{i} into {stage + 1}", f"to {i} out of {stage - 1}"))
        for d in range(P):
            inputs[d][table.input_arrives[t, d]] = sent[(d - 1) % P][0]
            gradients[d][table.gradient_arrives[t, d]] = sent[(d + 1) % P][1]
    assert done == (last + 1) * schedule.micro_batches
    if schedule.name == "1f1b":
        assert table.input_slots <= P
    assert table.input_slots <= schedule.micro_batches * schedule.stages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zigzag", 2, 4), "there is no schedule 'zigzag'; there are gpipe, 1f1b, interleaved"),
        (("gpipe", 2, 4, 2), "2 stages of a device do not go with the schedule 'gpipe'"),
        (("interleaved", 2, 4, 1), "1 stages of a device do not go with the schedule 'interleaved'"),
        (("interleaved", 4, 6, 2), "6 is not a multiple of 4"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_schedule(*arguments)
