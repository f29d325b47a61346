"""The shapes that a step may have. Everything is padded up to one of them, so that all can be compiled ahead."""

import bisect
from collections.abc import Sequence

SMALLEST_MIXED = 16  # a step with any prefill is at least this large: fewer shapes, and no slower


def token_buckets(smallest: int, largest: int) -> tuple[int, ...]:
    """Powers of two from `smallest`, and `largest` itself."""
    return tuple(sorted({largest, *(2**i for i in range(32) if smallest <= 2**i < largest)}))


def bucket(n: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `n`."""
    return buckets[bisect.bisect_left(buckets, n)]


def row_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Rows (sequences) of a step: powers of four, since the sampler's program is the slowest to compile."""
    return tuple(sorted({max_num_seqs, *(4**i for i in range(16) if 4**i < max_num_seqs)}))
