"""The ledger of the paged cache: which sequence owns which page, and which pages hold what prefix.

Every layer group (layers that see equally far back) has a pool of its own. A page is used while a sequence refers to
it; after that it keeps its content for the prefix cache until the least recently used page is needed.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from tenfold.base.reach import Reach
from tenfold.engine.request import Sequence


class PagePool:
    """Pages 1 … num_pages - 1 of one layer group; page 0 is the null page and is never given out.

    Invariant: a page is either free (in `_free`, no references) or used (one or more references).
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._references = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))  # least recently used first
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - 1 - len(self._free)

    def allocate(self) -> int:
        """Takes the least recently used free page and forgets its content. Raises KeyError if none is free."""
        page, _ = self._free.popitem(last=False)
        content = self._hash_of.pop(page, None)
        if content is not None:
            del self._page_of[content]
        self._references[page] = 1
        return page

    def retain(self, page: int) -> None:
        """Adds a reference to a page found by `find`."""
        if self._references[page] == 0:
            del self._free[page]
        self._references[page] += 1

    def release(self, page: int) -> None:
        """Drops a reference. A page without content is reused before any that the prefix cache could still serve."""
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free[page] = None
            if page not in self._hash_of:
                self._free.move_to_end(page, last=False)

    def find(self, content: bytes) -> int | None:
        """The page with this content, used or free; None if there is none. Changes nothing."""
        return self._page_of.get(content)

    def register(self, page: int, content: bytes) -> None:
        """Makes a used page findable. Content that another page already has stays with that page."""
        if content not in self._page_of and page not in self._hash_of:
            self._page_of[content] = page
            self._hash_of[page] = content

    def forget(self) -> None:
        """Drops the content of every page; used pages stay used."""
        self._page_of.clear()
        self._hash_of.clear()

    def check(self, owned: Counter[int]) -> None:
        """Raises AssertionError unless the references are exactly the `owned` ones and everything else is free."""
        for page in range(1, self.num_pages):
            assert self._references[page] == owned[page], f"page {page}: {self._references[page]} != {owned[page]}"
            assert (page in self._free) == (self._references[page] == 0), (
                f"page {page} is both used and free, or neither"
            )
        assert {page: content for content, page in self._page_of.items()} == self._hash_of


@dataclass(frozen=True)
class Group:
    """Layers that share a block table, because their tokens see equally far back.

    Attributes:
        reach: how far.
        num_pages: of its pool, the null page among them.
        every: every so manieth block of a sequence keeps its page for the prefix cache, and of those that a step passes
            only these and the last get one at all. Recurrent layers need no others, and their states are large.
    """

    reach: Reach
    num_pages: int
    every: int = 1


class PageLedger:
    """The pages of all groups, and what sequences own of them."""

    def __init__(self, groups: SequenceOf[Group], block_size: int) -> None:
        self.groups = tuple(groups)
        self.block_size = block_size
        self.pools = [PagePool(group.num_pages) for group in groups]

    @property
    def num_used(self) -> int:
        return sum(pool.num_used for pool in self.pools)

    @property
    def num_pages(self) -> int:
        return sum(pool.num_pages - 1 for pool in self.pools)

    def match_prefix(self, seq: Sequence) -> int:
        """How many leading tokens of a waiting sequence the cache holds for every group. Changes no page.

        At least one token is left to compute, since its logits are wanted.
        """
        if not seq.lookup:
            return 0
        seq.extend_hashes(self.block_size)
        longest = min(len(seq.hashes), (len(seq.tokens) - 1) // self.block_size)
        for pool, group in zip(self.pools, self.groups, strict=True):
            if not group.reach.limited:
                hits = (i for i in range(longest) if pool.find(seq.hashes[i]) is None)
                longest = next(hits, longest)
        while longest > 0 and not self._windows_hold(seq, longest):
            longest -= 1
        return longest * self.block_size

    def _windows_hold(self, seq: Sequence, blocks: int) -> bool:
        """Whether every windowed group has the blocks that the token after `blocks` full ones can see."""
        return all(
            pool.find(seq.hashes[i]) is not None
            for pool, group in zip(self.pools, self.groups, strict=True)
            if group.reach.limited
            for i in range(self._first_visible(group, blocks * self.block_size), blocks)
        )

    def _first_visible(self, group: Group, computed: int) -> int:
        """The first block that the token at position `computed` sees."""
        return group.reach.first(computed) // self.block_size

    def attach(self, seq: Sequence, cached: int) -> None:
        """Starts a sequence on `cached` tokens that `match_prefix` found; it owns their visible pages from now on."""
        blocks = cached // self.block_size
        seq.tables, seq.dropped = [], []
        for pool, group in zip(self.pools, self.groups, strict=True):
            first = self._first_visible(group, cached)
            table = [0] * first
            for content in seq.hashes[first:blocks]:
                page = pool.find(content)
                assert page is not None
                pool.retain(page)
                table.append(page)
            seq.tables.append(table)
            seq.dropped.append(first)
        seq.computed = cached
        seq.registered = [blocks] * len(self.groups)

    def missing(self, seq: Sequence, length: int) -> list[list[bool]]:
        """For each group the blocks to add so that `seq` can hold `length` tokens: whether they get a page."""
        blocks = -(-length // self.block_size)
        return [
            [(block + 1) % group.every == 0 or block == blocks - 1 for block in range(len(table), blocks)]
            for group, table in zip(self.groups, seq.tables, strict=True)
        ]

    def fits(self, seq: Sequence, length: int) -> bool:
        """Whether `grow` to `length` tokens would succeed."""
        wanted = self.missing(seq, length)
        return all(pool.num_free >= sum(paged) for pool, paged in zip(self.pools, wanted, strict=True))

    def grow(self, seq: Sequence, length: int) -> None:
        """Gives `seq` the pages for `length` tokens. Only after `fits`."""
        for pool, table, paged in zip(self.pools, seq.tables, self.missing(seq, length), strict=True):
            table.extend(pool.allocate() if wanted else 0 for wanted in paged)

    def trim(self, seq: Sequence) -> None:
        """Gives back the pages that no token from `seq.computed` on can see."""
        for i, (pool, group) in enumerate(zip(self.pools, self.groups, strict=True)):
            first = min(self._first_visible(group, seq.computed), len(seq.tables[i]))
            for block in range(seq.dropped[i], first):
                if seq.tables[i][block]:
                    pool.release(seq.tables[i][block])
                    seq.tables[i][block] = 0
            seq.dropped[i] = max(seq.dropped[i], first)

    def register(self, seq: Sequence, *, dispatched: bool) -> None:
        """Makes the full blocks of `seq` that are computed and known findable for other sequences.

        `dispatched`: the step that computes them is on its way, so that whoever finds them runs after it. Until then
        only those may be found that can be read in the very step that writes them, which a state cannot.
        """
        seq.extend_hashes(self.block_size)
        full = min(seq.computed // self.block_size, len(seq.hashes))
        for i, (pool, group, table) in enumerate(zip(self.pools, self.groups, seq.tables, strict=True)):
            if group.reach.recurrent and not dispatched:
                continue
            for block in range(seq.registered[i], full):
                if table[block] and (block + 1) % group.every == 0:
                    pool.register(table[block], seq.hashes[block])
            seq.registered[i] = max(seq.registered[i], full)

    def free(self, seq: Sequence) -> None:
        """Gives back everything that `seq` owns; the last pages first, so that a prefix outlives its continuations."""
        for pool, table in zip(self.pools, seq.tables, strict=True):
            for page in reversed(table):
                if page:
                    pool.release(page)
        seq.tables, seq.dropped, seq.computed, seq.registered = [], [], 0, []

    def forget(self) -> None:
        """Empties the prefix cache; sequences keep their pages."""
        for pool in self.pools:
            pool.forget()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raises AssertionError unless pages in use are exactly the pages owned."""
        owned: list[Counter[int]] = [Counter() for _ in self.pools]
        for seq in sequences:
            for count, table in zip(owned, seq.tables, strict=False):
                count.update(page for page in table if page)
        for pool, count in zip(self.pools, owned, strict=True):
            pool.check(count)
