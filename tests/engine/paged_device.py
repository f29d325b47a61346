"""A device of plain Python: pages that hold what was written to them, and a history that tokens are read from.

Every page entry remembers the whole prefix that it was computed from, so that reading a page that was given away,
trimmed, shared wrongly or never written is noticed at once. Dispatched steps run in order, as on a real device.
"""

import zlib
from collections.abc import Sequence as SequenceOf

from tenfold.base.reach import Reach
from tenfold.engine.pages import Group
from tenfold.engine.request import Sequence
from tenfold.engine.scheduler import Chunk, Plan

VOCABULARY = 7


def next_token(tokens: SequenceOf[int]) -> int:
    """What the imaginary model answers: some function of everything before."""
    return zlib.crc32(repr(list(tokens)).encode()) % VOCABULARY


def visible(reach: Reach, position: int) -> list[int]:
    """The positions that the token at `position` sees."""
    return [
        seen
        for seen in range(position + 1)
        if (reach.window is None or position - seen < reach.window)
        and (reach.chunk is None or seen // reach.chunk == position // reach.chunk)
    ]


class PagedDevice:
    """Executes plans; `history` and `pages` are what a real device would hold."""

    def __init__(self, groups: SequenceOf[Group], block_size: int, slots: int, max_len: int) -> None:
        self.groups, self.block_size = groups, block_size
        self.history = [[-1] * max_len for _ in range(slots)]
        self.pages: list[dict[tuple[int, int], tuple[int, ...]]] = [{} for _ in groups]

    def run(self, plan: Plan) -> list[tuple[Chunk, int]]:
        """Runs a step; returns the sampling chunks with their tokens."""
        for chunk in plan.chunks:
            if chunk.admitted:
                row = self.history[chunk.seq.slot]
                row[:] = chunk.seq.tokens + [-1] * (len(row) - len(chunk.seq.tokens))
        for chunk in plan.chunks:  # a state is read before any of the step is written
            self.resume(chunk.seq, chunk.start)
        for chunk in plan.chunks:  # every other layer writes before it reads
            self.write(chunk.seq, chunk.start, chunk.length)
        sampled: list[tuple[Chunk, int]] = []
        for chunk in plan.chunks:
            for position in range(chunk.start, chunk.start + chunk.length):
                self.read(chunk.seq, position)
            if chunk.samples:
                end = chunk.start + chunk.length
                token = next_token(self.history[chunk.seq.slot][:end])
                self.history[chunk.seq.slot][end] = token
                sampled.append((chunk, token))
        return sampled

    def write(self, seq: Sequence, start: int, length: int) -> None:
        """Stores the entries of [start, start + length) where the block tables say; a state for a whole block."""
        for position in range(start, start + length):
            prefix = tuple(self.history[seq.slot][: position + 1])
            assert -1 not in prefix, f"the device does not know token {prefix.index(-1)}"
            for group, pages, table in zip(self.groups, self.pages, seq.tables, strict=True):
                page = table[position // self.block_size]
                if group.reach.recurrent:
                    assert page or position < start + length - 1, "the last token's state has no page"
                    pages[page, 0] = prefix
                else:
                    assert page, "a token has no page"
                    pages[page, position % self.block_size] = prefix

    def resume(self, seq: Sequence, start: int) -> None:
        """Checks that the token at `start` finds the states after the token before it."""
        for group, pages, table in zip(self.groups, self.pages, seq.tables, strict=True):
            if group.reach.recurrent and start > 0:
                page = table[(start - 1) // self.block_size]
                assert page, f"the state before position {start} was dropped"
                assert pages[page, 0] == tuple(self.history[seq.slot][:start]), "it is another state"

    def read(self, seq: Sequence, position: int) -> None:
        """Checks that the token at `position` finds all that it sees."""
        for group, pages, table in zip(self.groups, self.pages, seq.tables, strict=True):
            for seen in visible(group.reach, position) if not group.reach.recurrent else []:
                page = table[seen // self.block_size]
                assert page, f"position {seen} was dropped, and position {position} still sees it"
                found = pages[page, seen % self.block_size]
                assert found == tuple(self.history[seq.slot][: seen + 1]), f"position {seen} holds other content"
