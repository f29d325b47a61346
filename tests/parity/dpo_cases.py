"""Pairs of answers that both sides score. Needs only numpy."""

from typing import Any

import numpy as np

from tests.parity.training_cases import CONFIG

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.1},
    "hinge": {"beta": 0.05},
    "ipo": {"beta": 0.3},
}
ROW = 48  # tokens
REFERENCE_SEED = 7  # of the reference's weights, added to the policy's


def make_pairs(seed: int, count: int = 6) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompts, chosen and rejected answers, of different lengths."""
    rng = np.random.default_rng([seed, 1])

    def draw(shortest: int, longest: int) -> list[int]:
        return rng.integers(1, CONFIG["vocab_size"], rng.integers(shortest, longest)).tolist()

    return [(draw(2, 20), draw(1, 24), draw(1, 24)) for _ in range(count)]
