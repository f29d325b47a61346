"""The ledger of pages against simple models of it, after every one of many random operations."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenfold.base.reach import FULL, RECURRENT, Reach
from tenfold.engine.pages import Group, PageLedger, PagePool
from tenfold.engine.request import Sequence, prefix_root
from tenfold.engine.sampling_params import SamplingParams
from tests.engine.paged_device import PagedDevice, visible

NUM_PAGES = 6
CONTENTS = [b"a", b"b", b"c", b"d"]
PICK = st.integers(0, 11)


class PoolMachine(RuleBasedStateMachine):
    """A pool next to a model with plain lists: who refers to a page, what it holds, and in which order it goes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.references: Counter[int] = Counter()
        self.content: dict[int, bytes] = {}
        self.queue = list(range(1, NUM_PAGES))  # the next to be given out first

    def used(self) -> list[int]:
        return sorted(page for page, n in self.references.items() if n)

    @precondition(lambda self: self.queue)
    @rule()
    def allocate(self) -> None:
        page = self.pool.allocate()
        assert page == self.queue.pop(0)
        self.content.pop(page, None)
        self.references[page] = 1

    @precondition(lambda self: not self.queue)
    @rule()
    def cannot_allocate(self) -> None:
        with pytest.raises(KeyError):
            self.pool.allocate()

    @rule(content=st.sampled_from(CONTENTS))
    def find_and_retain(self, content: bytes) -> None:
        page = self.pool.find(content)
        assert page == next((p for p, c in self.content.items() if c == content), None)
        if page is not None:
            self.pool.retain(page)
            self.references[page] += 1
            if page in self.queue:
                self.queue.remove(page)

    @precondition(lambda self: self.used())
    @rule(pick=PICK, content=st.sampled_from(CONTENTS))
    def register(self, pick: int, content: bytes) -> None:
        page = self.used()[pick % len(self.used())]
        self.pool.register(page, content)
        if content not in self.content.values():
            self.content.setdefault(page, content)

    @precondition(lambda self: self.used())
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        page = self.used()[pick % len(self.used())]
        self.pool.release(page)
        self.references[page] -= 1
        if not self.references[page]:
            self.queue.insert(len(self.queue) if page in self.content else 0, page)

    @rule()
    def forget(self) -> None:
        self.pool.forget()
        self.content.clear()

    @invariant()
    def agrees(self) -> None:
        self.pool.check(self.references)
        assert self.pool.num_free == len(self.queue)
        assert self.pool.num_used == len(self.used())


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestPool = PoolMachine.TestCase

GROUPS = (
    Group(FULL, 14),
    Group(Reach(5), 9),
    Group(Reach(12), 11),
    Group(Reach(chunk=6), 9),
    Group(RECURRENT, 7, every=2),
)
BLOCK = 4
MAX_LEN = 40


class LedgerMachine(RuleBasedStateMachine):
    """Sequences of few distinct tokens, so that prefixes meet, over three groups with small pools."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = PageLedger(GROUPS, BLOCK)
        self.device = PagedDevice(GROUPS, BLOCK, slots=64, max_len=MAX_LEN)
        self.live: list[Sequence] = []
        self.started = 0

    def pick(self, i: int) -> Sequence:
        return self.live[i % len(self.live)]

    @precondition(lambda self: len(self.live) < 5)
    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_LEN),
        likeness=st.integers(0, MAX_LEN),
        salt=st.sampled_from([None, None, "salt"]),
        lookup=st.sampled_from([True, True, True, False]),
        pick=PICK,
    )
    def start(self, tokens: list[int], likeness: int, salt: str | None, lookup: bool, pick: int) -> None:
        if self.live:  # begin like another one
            tokens = self.pick(pick).tokens[:likeness] + tokens
        seq = Sequence(
            request_id=str(self.started),
            index=0,
            tokens=tokens[:MAX_LEN],
            prompt_length=len(tokens[:MAX_LEN]),
            params=SamplingParams(),
            seed=(0, 0),
            eos_token_ids=frozenset(),
            max_tokens=1,
            root=prefix_root(salt),
            lookup=lookup,
        )
        cached = self.ledger.match_prefix(seq)
        assert cached % BLOCK == 0
        assert 0 <= cached < len(seq.tokens)
        assert lookup or cached == 0
        self.ledger.attach(seq, cached)
        assert seq.computed == cached
        seq.slot = self.started % 64
        self.device.history[seq.slot][: len(seq.tokens)] = seq.tokens
        if cached:  # what the next token sees of the prefix is there
            position = cached - 1
            self.device.resume(seq, cached)
            for group, pages, table in zip(GROUPS, self.device.pages, seq.tables, strict=True):
                for seen in set(visible(group.reach, position + 1)) - {cached} if not group.reach.recurrent else ():
                    found = pages[table[seen // BLOCK], seen % BLOCK]
                    assert found == tuple(seq.tokens[: seen + 1])
        self.started += 1
        self.live.append(seq)

    @precondition(lambda self: self.live)
    @rule(pick=PICK, wanted=st.integers(1, 12))
    def compute(self, pick: int, wanted: int) -> None:
        seq = self.pick(pick)
        length = min(wanted, len(seq.tokens) - seq.computed)
        fits = self.ledger.fits(seq, seq.computed + length)
        blocks = -(-(seq.computed + length) // BLOCK)
        needed = [
            sum((block + 1) % group.every == 0 or block == blocks - 1 for block in range(len(table), blocks))
            for group, table in zip(GROUPS, seq.tables, strict=True)
        ]
        free = [pool.num_free for pool in self.ledger.pools]
        assert fits == all(n <= m for n, m in zip(needed, free, strict=True))
        if not fits or not length:
            return
        self.ledger.grow(seq, seq.computed + length)
        assert [pool.num_free for pool in self.ledger.pools] == [m - n for n, m in zip(needed, free, strict=True)]
        start, seq.computed = seq.computed, seq.computed + length
        self.ledger.register(seq, dispatched=False)
        self.device.resume(seq, start)
        self.device.write(seq, start, length)
        self.ledger.register(seq, dispatched=True)
        for position in range(start, seq.computed):
            self.device.read(seq, position)

    @precondition(lambda self: self.live)
    @rule(pick=PICK, token=st.integers(0, 1))
    def generate(self, pick: int, token: int) -> None:
        seq = self.pick(pick)
        if len(seq.tokens) < MAX_LEN:
            self.device.history[seq.slot][len(seq.tokens)] = token
            seq.tokens.append(token)
            self.ledger.register(seq, dispatched=True)

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def trim(self, pick: int) -> None:
        seq = self.pick(pick)
        self.ledger.trim(seq)
        for group, table in zip(GROUPS, seq.tables, strict=True):
            first = visible(group.reach, seq.computed)[0] // BLOCK
            assert [bool(page) for page in table] == [block >= first for block in range(len(table))]
            assert not group.reach.recurrent or sum(map(bool, table)) <= 1  # the last state is all that is left

    @precondition(lambda self: self.live)
    @rule(pick=PICK)
    def free(self, pick: int) -> None:
        seq = self.pick(pick)
        self.live.remove(seq)
        self.ledger.free(seq)
        assert not any(seq.tables)

    @rule()
    def forget(self) -> None:
        self.ledger.forget()

    @invariant()
    def pages_in_use_are_pages_owned(self) -> None:
        self.ledger.check(self.live)
        owned = [{page for seq in self.live for page in seq.tables[g] if page} for g in range(len(GROUPS))]
        assert [pool.num_used for pool in self.ledger.pools] == [len(pages) for pages in owned]
        assert self.ledger.num_used == sum(map(len, owned))

    @invariant()
    def tables_cover_what_can_be_seen(self) -> None:
        for seq in self.live:
            for group, table in zip(GROUPS, seq.tables, strict=True):
                for position in set(visible(group.reach, seq.computed)) - {seq.computed}:
                    assert table[position // BLOCK]


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
TestLedger = LedgerMachine.TestCase


def sequence(tokens: list[int], salt: str | None = None) -> Sequence:
    return Sequence("r", 0, tokens, len(tokens), SamplingParams(), (0, 0), frozenset(), 1, root=prefix_root(salt))


def compute(ledger: PageLedger, seq: Sequence) -> None:
    ledger.attach(seq, ledger.match_prefix(seq))
    ledger.grow(seq, len(seq.tokens))
    seq.computed = len(seq.tokens)
    ledger.register(seq, dispatched=True)


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8)])
def test_a_hit_leaves_at_least_one_token_to_compute(length: int, cached: int) -> None:
    ledger = PageLedger([Group(FULL, 20)], 4)
    compute(ledger, sequence(list(range(12))))
    assert ledger.match_prefix(sequence(list(range(length)))) == cached


def test_a_hit_ends_at_the_first_other_token() -> None:
    ledger = PageLedger([Group(FULL, 20)], 4)
    compute(ledger, sequence(list(range(12))))
    assert ledger.match_prefix(sequence([0, 1, 2, 3, 4, 5, 99, 7, 8, 9])) == 4
    assert ledger.match_prefix(sequence([99, 1, 2, 3, 4, 5, 6, 7, 8, 9])) == 0
    assert ledger.match_prefix(sequence([4, 5, 6, 7, 8, 9])) == 0  # the same block elsewhere is another block


def test_salts_share_nothing() -> None:
    ledger = PageLedger([Group(FULL, 20)], 4)
    compute(ledger, sequence(list(range(12)), salt="one"))
    assert ledger.match_prefix(sequence(list(range(12)), salt="two")) == 0
    assert ledger.match_prefix(sequence(list(range(12)))) == 0
    assert ledger.match_prefix(sequence(list(range(12)), salt="one")) == 8


def test_a_prefix_outlives_its_continuation() -> None:
    """Freed pages go back last block first, so the first blocks, which others may share, are evicted last."""
    ledger = PageLedger([Group(FULL, 7)], 4)
    first = sequence(list(range(24)))
    compute(ledger, first)
    ledger.free(first)
    compute(ledger, sequence([50] * 12))  # takes three of the six pages
    assert ledger.match_prefix(sequence(list(range(24)))) == 12


def test_a_window_needs_only_its_own_blocks() -> None:
    ledger = PageLedger([Group(FULL, 6), Group(Reach(5), 5)], 4)
    seq = sequence(list(range(17)))
    ledger.attach(seq, 0)
    for length in (4, 8, 12, 16, 17):
        ledger.grow(seq, length)
        seq.computed = length
        ledger.register(seq, dispatched=True)
        ledger.trim(seq)
    # position 17 sees 13 … 17: of the windowed group blocks 3 and 4, of the other all five
    assert [[bool(page) for page in table] for table in seq.tables] == [[True] * 5, [False] * 3 + [True] * 2]
    ledger.free(seq)
    for _ in range(3):
        ledger.pools[1].allocate()  # evicts all of the group but block 3
    again = sequence([*range(17), 17])
    assert ledger.match_prefix(again) == 16
    ledger.attach(again, 16)
    assert [[bool(page) for page in table] for table in again.tables] == [[True] * 4, [False] * 3 + [True]]
    ledger.pools[1].release(again.tables[1][3])
    ledger.pools[1].allocate()
    assert ledger.match_prefix(again) == 0  # all of the full group is there, but nothing that the window sees


def test_states_are_found_at_their_interval_once_their_step_is_dispatched() -> None:
    ledger = PageLedger([Group(FULL, 12), Group(RECURRENT, 6, every=2)], 4)
    seq = sequence(list(range(23)))
    ledger.attach(seq, 0)
    ledger.grow(seq, 19)  # passes five blocks; the second and the fourth keep their states
    assert [[bool(page) for page in table] for table in seq.tables] == [[True] * 5, [False, True, False, True, True]]
    seq.computed = 19
    ledger.register(seq, dispatched=False)
    assert ledger.match_prefix(sequence(list(range(23)))) == 0
    ledger.register(seq, dispatched=True)
    ledger.trim(seq)
    assert ledger.match_prefix(sequence(list(range(23)))) == 16
    assert ledger.match_prefix(sequence(list(range(16)))) == 8  # one token is left to compute
    ledger.grow(seq, 23)  # leaves the fifth block, which keeps no state for others
    seq.computed = 23
    ledger.register(seq, dispatched=True)
    ledger.trim(seq)
    assert [bool(page) for page in seq.tables[1]] == [False] * 5 + [True]
    assert ledger.match_prefix(sequence(list(range(30)))) == 16
    ledger.check([seq])
