"""The scheduler against a device of plain Python, stepped as the engine steps it: one step ahead of the results."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.base.reach import FULL, RECURRENT, Reach
from tenfold.engine.pages import Group, PageLedger
from tenfold.engine.request import Sequence, Status, prefix_root
from tenfold.engine.sampling_params import SamplingParams
from tenfold.engine.scheduler import Chunk, Plan, Scheduler
from tests.engine.paged_device import VOCABULARY, PagedDevice, next_token, visible

MAX_LEN = 36


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of one scheduler; pools hold `longest` sequences of `MAX_LEN` tokens, and some pages more."""

    block_size: int = 4
    reaches: tuple[Reach, ...] = (FULL,)
    max_num_seqs: int = 3
    max_num_batched_tokens: int = 8
    prefill_share: int | None = None  # tokens next to the decodes; None: all of the budget
    longest: float = 1.0
    every: int = 1  # of so many blocks a recurrent group keeps one


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to ask for, and when."""

    prompt: tuple[int, ...]
    arrives: int = 0
    max_tokens: int = 8
    min_tokens: int = 0
    priority: int = 0
    lookup: bool = True
    eos: frozenset[int] = frozenset()
    aborted: int | None = None  # at this step, if it is still there


def alone(request: Request) -> list[int]:
    """The tokens of a request, from the imaginary model alone."""
    tokens = list(request.prompt)
    for n in range(1, min(request.max_tokens, MAX_LEN - len(request.prompt)) + 1):
        tokens.append(next_token(tokens))
        if n >= request.min_tokens and tokens[-1] in request.eos:
            break
    return tokens[len(request.prompt) :]


@dataclass
class Simulation:
    """Drives a scheduler with `PagedDevice`, and checks every step."""

    sizes: Sizes
    requests: list[Request]
    finished: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    plans: list[Plan] = field(default_factory=list[Plan])
    step: int = 0

    def __post_init__(self) -> None:
        s = self.sizes
        groups = [
            Group(reach, 1 + int(self._blocks(reach) * s.longest), s.every if reach.recurrent else 1)
            for reach in s.reaches
        ]
        share = s.prefill_share
        self.scheduler = Scheduler(
            ledger=PageLedger(groups, s.block_size),
            max_num_seqs=s.max_num_seqs,
            max_num_batched_tokens=s.max_num_batched_tokens,
            prefill_budget=lambda n: s.max_num_batched_tokens if share is None or not n else n + share,
        )
        self.device = PagedDevice(groups, s.block_size, s.max_num_seqs, MAX_LEN)
        self.sequences = [
            Sequence(
                request_id=str(i),
                index=0,
                tokens=list(r.prompt),
                prompt_length=len(r.prompt),
                params=SamplingParams(max_tokens=r.max_tokens, min_tokens=r.min_tokens),
                seed=(0, 0),
                eos_token_ids=r.eos,
                max_tokens=min(r.max_tokens, MAX_LEN - len(r.prompt)),
                priority=r.priority,
                arrival=i,
                root=prefix_root(None),
                lookup=r.lookup,
            )
            for i, r in enumerate(self.requests)
        ]
        self.inflight: list[tuple[Chunk, int]] | None = None

    def _blocks(self, reach: Reach) -> int:
        """The most blocks that one sequence owns: any `reach - 1 + budget` neighbouring tokens, however they lie.

        Of states: that before a chunk, that after it, and those kept on the way.
        """
        if reach.recurrent:
            return 2 + -(-self.sizes.max_num_batched_tokens // (self.sizes.every * self.sizes.block_size))
        tokens = MAX_LEN if reach.most is None else min(MAX_LEN, reach.most - 1 + self.sizes.max_num_batched_tokens)
        return min(-(-MAX_LEN // self.sizes.block_size), (tokens - 2) // self.sizes.block_size + 2)

    def run(self, limit: int = 3000) -> None:
        """Until every request has ended."""
        while any(seq.status is not Status.FINISHED for seq in self.sequences) or self.inflight is not None:
            self.advance()
            assert self.step < limit, "requests are not served"
        self.scheduler.check()
        assert self.scheduler.ledger.num_used == 0
        assert self.scheduler.num_waiting == 0
        assert not self.scheduler.running

    def advance(self) -> Plan | None:
        """One step: arrivals and aborts, then the engine's order of things."""
        for seq, request in zip(self.sequences, self.requests, strict=True):
            if request.arrives == self.step and seq.status is not Status.FINISHED:
                self.scheduler.add(seq)
            if request.aborted == self.step and seq.status is not Status.FINISHED:
                if self.step >= request.arrives:
                    self.scheduler.finish(seq)
                seq.status = Status.FINISHED
        self.step += 1
        before, known = list(self.scheduler.running), {seq: seq.known for seq in self.sequences}
        prompts = min(self.scheduler.num_waiting, self.scheduler.num_free_slots)
        prompts += sum(seq.known - seq.computed > 1 for seq in before)
        crowd = prompts > sum(seq.known - seq.computed == 1 and not seq.exhausted for seq in before)
        plan = self.scheduler.schedule()
        self._check_plan(plan, before, known, crowd=crowd)
        result = None
        if plan is not None:
            self.plans.append(plan)
            result = self.device.run(plan)
            self.scheduler.trim()
            self._check_tables()
        previous, self.inflight = self.inflight, result
        for chunk, token in previous or []:
            self._commit(chunk.seq, token)
        self.scheduler.check()
        return plan

    def _commit(self, seq: Sequence, token: int) -> None:
        if seq.status is Status.FINISHED:
            return
        self.scheduler.commit(seq, token)
        if seq.finish_reason() is not None:
            self.scheduler.finish(seq)
            self.finished[int(seq.request_id)] = seq.tokens[seq.prompt_length :]

    def _check_plan(
        self, plan: Plan | None, before: list[Sequence], known: dict[Sequence, int], *, crowd: bool
    ) -> None:
        scheduler, chunks = self.scheduler, plan.chunks if plan else ()
        preempted = [seq for seq in before if seq.status is Status.WAITING]
        admitted = [chunk.seq for chunk in chunks if chunk.admitted]
        decodes = sum(chunk.length == 1 and not chunk.admitted for chunk in chunks)
        assert sum(chunk.length for chunk in chunks) <= self.sizes.max_num_batched_tokens
        if decodes and self.sizes.prefill_share is not None and not crowd:  # fewer wait for a first token than a next
            assert sum(chunk.length for chunk in chunks) <= decodes + len(preempted) + max(1, self.sizes.prefill_share)
        assert [chunk.length > 1 for chunk in chunks] == sorted(chunk.length > 1 for chunk in chunks)
        assert len({chunk.seq.slot for chunk in chunks} - {-1}) == len(chunks)
        for chunk in chunks:
            assert chunk.start + chunk.length == chunk.seq.computed <= known[chunk.seq]
            assert chunk.samples == (chunk.seq.computed == known[chunk.seq])
            assert chunk.admitted == (chunk.seq not in before or chunk.seq in preempted)
        # First come, first served: nobody overtakes in the queue, and nobody gives way to one who comes later.
        waiting = [seq for seq in scheduler.sequences if seq.status is Status.WAITING]
        assert waiting == sorted(waiting, key=lambda seq: seq.order)
        assert all(a.order < w.order for a in admitted for w in waiting)
        assert all(chunk.seq.order < seq.order for chunk in chunks for seq in preempted)
        assert not (preempted and admitted)
        first = min(before, key=lambda seq: seq.order, default=None)
        if first is not None:  # it goes on, or only its last token is on its way
            assert first in [chunk.seq for chunk in chunks] or first.exhausted
        assert chunks or not (scheduler.running or waiting) or self.inflight, "nothing runs, and nothing will change"

    def _check_tables(self) -> None:
        """Every block that can still be seen is there; a window's group holds no others after a trim."""
        for seq in self.scheduler.running:
            for reach, table in zip(self.sizes.reaches, seq.tables, strict=True):
                first = visible(reach, seq.computed)[0] // self.sizes.block_size
                covered = -(-seq.computed // self.sizes.block_size)
                assert [bool(page) for page in table] == [block >= first for block in range(max(covered, len(table)))]


prompts = st.tuples(st.integers(0, 2), st.integers(0, MAX_LEN - 2), st.lists(st.integers(0, 6), max_size=6)).map(
    lambda t: tuple([(7 * t[0] + i * i) % VOCABULARY for i in range(t[1])] + t[2])[: MAX_LEN - 1] or (0,)
)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    max_tokens = draw(st.integers(1, 24))
    return Request(
        prompt=draw(prompts),
        arrives=draw(st.integers(0, 12)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        priority=draw(st.sampled_from([0, 0, 1, -1])),
        lookup=draw(st.sampled_from([True, True, True, False])),
        eos=frozenset(draw(st.sampled_from([(), (), (3,), (1, 5)]))),
        aborted=draw(st.none() | st.integers(0, 30)),
    )


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    seqs = draw(st.integers(1, 5))
    return Sizes(
        block_size=draw(st.sampled_from([1, 3, 4, 8])),
        reaches=draw(
            st.sampled_from(
                [
                    (FULL,),
                    (FULL,),
                    (FULL, Reach(5)),
                    (Reach(6),),
                    (FULL, Reach(3), Reach(9)),
                    (FULL, Reach(chunk=7)),
                    (RECURRENT, FULL),
                    (RECURRENT,),
                ]
            )
        ),
        every=draw(st.sampled_from([1, 2, 3])),
        max_num_seqs=seqs,
        max_num_batched_tokens=draw(st.integers(seqs, seqs + 12)),
        prefill_share=draw(st.sampled_from([None, 0, 1, 4])),
        longest=draw(st.sampled_from([1.0, 1.2, 2.0])),
    )


def check_workload(size: Sizes, asked: list[Request]) -> Simulation:
    simulation = Simulation(size, asked)
    simulation.run()
    for i, request in enumerate(asked):
        tokens = simulation.finished.get(i)
        assert tokens == alone(request) if tokens is not None or request.aborted is None else True
    return simulation


@settings(max_examples=60)
@given(sizes(), st.lists(requests(), min_size=1, max_size=7))
def test_any_workload_is_served_exactly(size: Sizes, asked: list[Request]) -> None:
    check_workload(size, asked)


@pytest.mark.slow
@settings(max_examples=3000)
@given(sizes(), st.lists(requests(), min_size=1, max_size=12))
def test_any_workload_is_served_exactly_at_depth(size: Sizes, asked: list[Request]) -> None:
    check_workload(size, asked)


@pytest.mark.parametrize("reaches", [(FULL,), (FULL, Reach(5)), (FULL, Reach(chunk=6)), (FULL, RECURRENT)])
def test_a_crowd_in_a_small_cache_is_served(reaches: tuple[Reach, ...]) -> None:
    """Preemptions happen often, the victims keep their tokens, and every page comes back."""
    random = Random(0)
    asked = [
        Request(prompt=tuple(random.choices(range(7), k=random.randint(1, 20))), arrives=i // 3, max_tokens=16)
        for i in range(24)
    ]
    simulation = check_workload(Sizes(reaches=reaches, max_num_seqs=4, longest=1.0), asked)
    assert simulation.scheduler.counters.preemptions > 10
    assert len(simulation.finished) == 24


def serve(size: Sizes, asked: list[Request], until: Callable[[Simulation], bool]) -> Simulation:
    simulation = Simulation(size, asked)
    while not until(simulation):
        simulation.advance()
        assert simulation.step < 200
    return simulation


def test_a_long_prompt_is_not_starved_by_short_ones_behind_it() -> None:
    """A prompt that takes all pages, in chunks, while short requests arrive in every step."""
    long = Request(prompt=tuple(i % 7 for i in range(34)), arrives=2, max_tokens=1)
    asked = [Request(prompt=(i % 7, 1, 2), arrives=i, max_tokens=12) for i in range(40)]
    simulation = Simulation(Sizes(max_num_seqs=4, max_num_batched_tokens=8), [*asked[:3], long, *asked[3:]])
    simulation.run()
    ended = list(simulation.finished)
    assert ended.index(3) <= 3  # only those that came before it may end before it


def test_priority_decides_who_gives_way() -> None:
    """A prompt of high priority takes its pages from a decode of low priority, not the other way round."""
    size = Sizes(max_num_seqs=2, max_num_batched_tokens=4, longest=1.0)
    low = Request(prompt=(1,) * 4, max_tokens=30, priority=5)
    high = Request(prompt=tuple(i % 7 for i in range(34)), arrives=3, max_tokens=2, priority=0)
    simulation = check_workload(size, [low, high])
    assert list(simulation.finished) == [1, 0]
    assert simulation.scheduler.counters.preemptions >= 1
    assert sum(c.admitted for plan in simulation.plans for c in plan.chunks if c.seq.request_id == "1") == 1


def test_the_queue_is_served_by_priority_then_arrival() -> None:
    asked = [Request(prompt=(i,), max_tokens=2, priority=p) for i, p in enumerate([1, 0, 1, 0, -1])]
    simulation = check_workload(Sizes(max_num_seqs=1, max_num_batched_tokens=4, longest=3.0), asked)
    assert list(simulation.finished) == [4, 1, 3, 0, 2]


def test_decodes_go_on_while_a_prompt_is_computed_in_chunks() -> None:
    size = Sizes(max_num_seqs=3, max_num_batched_tokens=6, prefill_share=2, longest=3.0)
    asked = [
        Request(prompt=(1, 2), max_tokens=30),
        Request(prompt=(3,), max_tokens=30),
        Request(prompt=tuple(i % 7 for i in range(20)), arrives=3),
    ]
    simulation = serve(size, asked, lambda s: s.sequences[2].computed >= 20)
    mixed = [plan for plan in simulation.plans if any(c.seq.request_id == "2" and not c.samples for c in plan.chunks)]
    assert len(mixed) == 9  # 20 tokens, two at a time; the last chunk samples
    for plan in mixed:
        assert [chunk.length for chunk in plan.chunks] == [1, 1, 2]


@pytest.mark.parametrize(("length", "expected"), [(3, [1, 3, 3, 3]), (4, [1, 1])])
def test_one_step_of_many_prompts_may_hold_up_few_decodes(length: int, expected: list[int]) -> None:
    """Three prompts and a decode, and room for 10 tokens: prompts that fit are computed at once, others in chunks."""
    size = Sizes(max_num_seqs=4, max_num_batched_tokens=10, prefill_share=1, longest=4.0)
    prompt = tuple(range(length))
    asked = [Request(prompt=(1, 2), max_tokens=30), *[Request(prompt=prompt, arrives=3)] * 3]
    simulation = serve(size, asked, lambda s: all(seq.computed for seq in s.sequences))
    first = next(plan for plan in simulation.plans if any(chunk.seq.request_id == "1" for chunk in plan.chunks))
    assert [chunk.length for chunk in first.chunks] == expected


def test_one_step_ahead_a_token_after_the_last_is_dropped() -> None:
    """The end token is seen one step late: the step in flight computes one more, which nobody gets."""
    tokens = alone(Request(prompt=(1, 2, 3), max_tokens=10))
    end = next(i for i in range(2, 10) if tokens[i] not in tokens[:i])
    request = Request(prompt=(1, 2, 3), max_tokens=10, eos=frozenset([tokens[end]]))
    simulation = check_workload(Sizes(), [request])
    assert simulation.finished[0] == tokens[: end + 1]
    assert sum(chunk.samples for plan in simulation.plans for chunk in plan.chunks) == end + 2


def test_no_step_is_wasted_after_max_tokens() -> None:
    """What ends by length is known ahead."""
    simulation = check_workload(Sizes(), [Request(prompt=(1, 2, 3), max_tokens=5)])
    assert sum(chunk.samples for plan in simulation.plans for chunk in plan.chunks) == 5


@pytest.mark.parametrize("when", range(1, 9))
def test_abort_gives_back_everything_at_once(when: int) -> None:
    """Waiting, in its prompt, decoding with a token in flight: nothing stays."""
    size = Sizes(max_num_seqs=1, longest=2.0)
    asked = [
        Request(prompt=tuple(range(7)) * 2, max_tokens=20, aborted=when),
        Request(prompt=(1,), max_tokens=20, aborted=when),
    ]
    simulation = serve(size, asked, lambda s: s.step == when)
    assert simulation.scheduler.ledger.num_used > 0
    for seq in simulation.sequences:
        simulation.scheduler.finish(seq)
    assert simulation.scheduler.ledger.num_used == 0
    simulation.scheduler.check()
    simulation.run()
    assert not simulation.finished


def test_same_prompts_in_one_step_share_pages() -> None:
    prompt = tuple(i % 7 for i in range(18))
    size = Sizes(max_num_seqs=3, max_num_batched_tokens=32, longest=3.0)
    simulation = serve(size, [Request(prompt=prompt)] * 3, lambda s: s.step == 1)
    (plan,) = simulation.plans
    assert sorted(chunk.length for chunk in plan.chunks) == [2, 2, 18]
    assert simulation.scheduler.ledger.num_used == 4 + 3  # four full blocks together, and a last one each
    assert simulation.scheduler.counters.prefix_hits == 2 * 16


def test_a_preempted_sequence_finds_its_own_pages_again() -> None:
    """What is computed again after a preemption is only what was evicted meanwhile."""
    size = Sizes(max_num_seqs=2, max_num_batched_tokens=20, longest=1.2)
    first = Request(prompt=tuple(i % 7 for i in range(17)), max_tokens=5)
    second = Request(prompt=tuple(i * 3 % 7 for i in range(19)), arrives=1, max_tokens=8)
    simulation = check_workload(size, [first, second])
    assert simulation.scheduler.counters.preemptions == 1
    again = [c for plan in simulation.plans for c in plan.chunks if c.admitted and c.seq.request_id == "1"][1]
    assert again.start >= 12
