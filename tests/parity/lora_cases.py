"""Training runs of adapters that both sides make, on the documents of `training_cases`. Needs only numpy."""

import zlib
from typing import Any

import numpy as np

STEPS = 50
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8},  # of all linear layers
    "dora": {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "use_dora": True,
        "use_rslora": True,
    },
}


def draw_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """An adapter's tensor, a function of its name in PEFT's files and of the seed; lengths of outputs are positive."""
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if "magnitude" in name:
        return random.uniform(1.0, 2.0, shape).astype(np.float32)
    return random.normal(scale=0.1, size=shape).astype(np.float32)
