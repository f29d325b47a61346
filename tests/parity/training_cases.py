"""The training run that both sides make: documents by a rule that can be learnt, drawn by seed. Needs only numpy."""

from typing import Any

import numpy as np

from tests.parity.cases import LLAMA, SIZES

CONFIG: dict[str, Any] = {
    "architectures": [LLAMA[0]],
    "model_type": LLAMA[1],
    **SIZES,
    "rms_norm_eps": 1e-5,
    "dtype": "float32",
}
STEPS = 100
ROW = 64  # tokens
OPTIMIZER = {
    "learning_rate": 3e-3,
    "warmup_steps": 10,
    "weight_decay": 0.1,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "max_grad_norm": 1.0,
}


def make_documents(step: int, seed: int) -> list[list[int]]:
    """The batch of a step: documents of 4 to 40 tokens in which a token follows mostly by a rule from the one before.

    Half of a document's steps are random, so that the loss neither vanishes nor stays.
    """
    rng = np.random.default_rng([seed, step])
    documents = []
    for length in rng.integers(4, 41, 16):
        tokens = [int(rng.integers(0, CONFIG["vocab_size"]))]
        for jump in rng.random(length - 1) < 0.3:
            following = (3 * tokens[-1] + 7) % CONFIG["vocab_size"]
            tokens.append(int(rng.integers(0, CONFIG["vocab_size"])) if jump else following)
        documents.append(tokens)
    return documents
