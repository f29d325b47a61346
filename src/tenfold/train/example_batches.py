"""Batches of examples that are all in memory: pairs and triples, which are not packed."""

from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

from tenfold.base.errors import DataError
from tenfold.data.packing import Example, Rows, pack
from tenfold.train.batches import Batches


def alone(examples: Sequence[Example], length: int, pad_id: int) -> Rows:
    """Each example in a row of its own, [N, length]; in their order.

    Raises ConfigError if one is longer than a row.
    """
    rows = [pack([example], length, pad_id) for example in examples]
    return Rows(*(np.concatenate(arrays) for arrays in zip(*rows, strict=True)))


def example_batches(examples: Any, *, rows: int, seed: int, share: tuple[int, int] = (0, 1)) -> Batches:
    """Endless batches of some examples, shuffled anew every time all were seen.

    Args:
        examples: a pytree of arrays whose leading dim counts examples.
        rows: of this share in a batch.
        seed: of the shuffles.
        share: which share of the rows is read here, and how many there are, as of `Layout.row_share`.

    Raises DataError if there are fewer examples than a batch has.
    """
    index, count = share
    total = len(jax.tree.leaves(examples)[0])
    if total // count < rows:
        raise DataError(f"there are {total} examples, too few for a batch of {rows * count}; take a smaller batch_size")

    def take(numbers: Sequence[int]) -> Any:
        return jax.tree.map(lambda array: array[np.asarray(numbers)], examples)

    numbers = grain.MapDataset.range(total).shuffle(seed=seed % 2**32)[index::count].repeat()
    return iter(numbers.batch(rows, batch_fn=take).to_iter_dataset())
