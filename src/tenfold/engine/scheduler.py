"""Decides what each step computes. Host code without jax.

One invariant instead of modes: every running sequence has known tokens and computed tokens, and a step moves the
computed ones towards the known ones, within a budget. Prefill, chunked prefill, decoding and recomputation after a
preemption are all that. (The idea is vLLM V1's.)
"""

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tenfold.engine.pages import PageLedger
from tenfold.engine.request import Sequence, Status


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, start + length) of a sequence, to be computed in one step.

    Attributes:
        samples: the chunk reaches the last known token, so the next one is sampled.
        admitted: the sequence has just been given its slot: the device does not know its tokens yet.
    """

    seq: Sequence
    start: int
    length: int
    samples: bool
    admitted: bool


@dataclass(frozen=True)
class Plan:
    """One step: its chunks, single-token ones first."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_decodes(self) -> int:
        return sum(chunk.length == 1 for chunk in self.chunks)


@dataclass
class Counters:
    """Totals since the start."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0


@dataclass
class Scheduler:
    """The queue, the running sequences, and their claim on pages and slots.

    Attributes:
        ledger: the pages.
        max_num_seqs: slots.
        max_num_batched_tokens: budget of a step.
        prefill_budget: given the number of running decodes, how many tokens a step may hold so that those decodes are
            not held up too long.
    """

    ledger: PageLedger
    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_budget: Callable[[int], int]
    counters: Counters = field(default_factory=Counters)
    running: list[Sequence] = field(default_factory=list[Sequence])
    _waiting: list[tuple[tuple[int, int, int], Sequence]] = field(
        default_factory=list[tuple[tuple[int, int, int], Sequence]]
    )
    _slots: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self._slots = list(reversed(range(self.max_num_seqs)))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_free_slots(self) -> int:
        return len(self._slots)

    @property
    def sequences(self) -> Iterable[Sequence]:
        yield from self.running
        for _, seq in self._waiting:
            yield seq

    def add(self, seq: Sequence) -> None:
        """Queues a sequence behind those of its priority that came earlier."""
        bisect.insort(self._waiting, (seq.order, seq), key=lambda entry: entry[0])

    def schedule(self) -> Plan | None:
        """The next step, or None if nothing can be computed now. Claims pages and advances `computed`.

        Running sequences claim pages in the order of service, so that whoever gives way was to be served later. Every
        decode has its token of the budget set aside, and there is always one for the others. Nothing is admitted into a
        step that is short of pages.
        """
        chunks: list[Chunk] = []
        decodes = {seq for seq in self.running if seq.known - seq.computed == 1 and not seq.exhausted}
        budget = self._budget(len(decodes))
        crowded = False
        for seq in sorted(self.running, key=lambda s: s.order):
            decodes.discard(seq)
            length = min(seq.known - seq.computed, budget - len(decodes))
            if seq.status is not Status.RUNNING or seq.exhausted or length < 1:
                continue
            crowded |= not self.ledger.fits(seq, seq.computed + length)
            if self._make_room(seq, seq.computed + length):
                budget -= length
                chunks.append(self._claim(seq, length, admitted=False))
        if not crowded:
            self._admit(chunks, budget)
        if not chunks:
            return None
        return Plan(tuple(sorted(chunks, key=lambda chunk: chunk.length > 1)))

    def _budget(self, decodes: int) -> int:
        """Tokens of the next step: few enough not to hold up its decodes, unless more sequences than those wait for
        their first token and get it by one step of all their prompts."""
        prompts = [seq.known - seq.computed for seq in self.running if seq.known - seq.computed > 1]
        prompts += [seq.known for _, seq in self._waiting[: self.num_free_slots]]
        if len(prompts) > decodes and decodes + sum(prompts) <= self.max_num_batched_tokens:
            return self.max_num_batched_tokens
        return min(self.max_num_batched_tokens, max(decodes + 1, self.prefill_budget(decodes)))

    def _make_room(self, seq: Sequence, length: int) -> bool:
        """Preempts those served after `seq` until it can hold `length` tokens; False if that is not enough."""
        while not self.ledger.fits(seq, length):
            victim = max(self.running, key=lambda s: s.order)
            if victim is seq:  # it keeps what it has: those before it go on, and finish or take it
                return False
            self._preempt(victim)
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.counters.preemptions += 1
        self._release(seq)
        seq.status = Status.WAITING
        self.add(seq)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Starts waiting sequences, in order, while budget, slots and pages last."""
        while self._waiting and budget > 0 and self._slots:
            seq = self._waiting[0][1]
            cached = self.ledger.match_prefix(seq)
            self.ledger.attach(seq, cached)
            length = min(seq.known - cached, budget)
            if not self.ledger.fits(seq, cached + length):
                self.ledger.free(seq)
                return
            self._waiting.pop(0)
            if seq.cached is None:
                seq.cached = cached
                self.counters.prefix_queries += seq.prompt_length
                self.counters.prefix_hits += cached
            seq.slot = self._slots.pop()
            seq.status = Status.RUNNING
            self.running.append(seq)
            budget -= length
            chunks.append(self._claim(seq, length, admitted=True))

    def _claim(self, seq: Sequence, length: int, *, admitted: bool) -> Chunk:
        """Gives the chunk its pages. Its full blocks can be shared at once: whoever reads them runs later, or in this
        very step, where every layer writes the cache before it reads it. Only states cannot: they wait for `trim`."""
        self.ledger.grow(seq, seq.computed + length)
        start = seq.computed
        seq.computed += length
        samples = seq.computed == seq.known
        self.counters.prompt_tokens += max(0, min(seq.computed, seq.prompt_length) - start)
        self.ledger.register(seq, dispatched=False)
        if samples:
            seq.pending += 1
        return Chunk(seq, start, length, samples, admitted)

    def commit(self, seq: Sequence, token: int) -> None:
        """Appends a token that a step has sampled for `seq`."""
        seq.tokens.append(token)
        seq.pending -= 1
        if seq.status is Status.RUNNING:
            self.ledger.register(seq, dispatched=True)

    def trim(self) -> None:
        """Lets states be found and gives back pages that windows have passed; after a plan is dispatched."""
        for seq in self.running:
            self.ledger.register(seq, dispatched=True)
            self.ledger.trim(seq)

    def finish(self, seq: Sequence) -> None:
        """Takes a sequence out, wherever it is, and gives back all that it owns."""
        if seq.status is Status.RUNNING:
            self._release(seq)
        elif seq.status is Status.WAITING:
            self._waiting.remove((seq.order, seq))
        seq.status = Status.FINISHED

    def _release(self, seq: Sequence) -> None:
        self.ledger.free(seq)
        self._slots.append(seq.slot)
        seq.slot = -1
        self.running.remove(seq)

    def check(self) -> None:
        """Raises AssertionError if a page or slot has leaked."""
        self.ledger.check(self.running)
        held = sorted([*self._slots, *(seq.slot for seq in self.running)])
        assert held == list(range(self.max_num_seqs)), f"slots: {held}"
