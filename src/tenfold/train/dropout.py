"""What dropout draws by: a seed for every row of a batch, which follows from the batch's number alone.

So a run that goes on drops what it would have dropped, and a loss stays a pure function of weights and a batch.

Dims: N rows.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from tenfold.train.batches import Batches


class Seeded(NamedTuple):
    """A batch to drop something of.

    Attributes:
        batch: as it is without.
        seeds: uint32 [N].
    """

    batch: Any
    seeds: Any

    def key(self) -> jax.Array:
        """The key of all draws for these rows, of which a part of a batch has another."""
        return jax.random.key(self.seeds[0])


class SeededBatches:
    """Batches, each with seeds; `Batches` themselves.

    Args:
        batches: of this process's share of the rows.
        seed: of the run.
        share: which share of the rows this process reads, as of `Layout.row_share`.
    """

    def __init__(self, batches: Batches, seed: int, share: int = 0) -> None:
        self._batches, self._seed, self._share = batches, seed, share
        self._drawn = 0

    def __next__(self) -> Seeded:
        batch = next(self._batches)
        rng = np.random.default_rng([self._seed % 2**32, self._share, self._drawn])
        self._drawn += 1
        return Seeded(batch, rng.integers(0, 2**32, len(jax.tree.leaves(batch)[0]), dtype=np.uint32))

    def get_state(self) -> dict[str, Any]:
        """As `Batches` has it."""
        return {"drawn": self._drawn, "of": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """As `Batches` has it."""
        self._drawn = state["drawn"]
        self._batches.set_state(state["of"])

    def close(self) -> None:
        """As `Batches` has it."""
        self._batches.close()
