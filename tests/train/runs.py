"""A run that a test can start, kill and start again: a tiny Llama that learns to count, from rows that Grain shuffles.

python -m tests.train.runs DIRECTORY STEPS
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tenfold.data.packing import Example
from tenfold.models.family import resolve
from tenfold.nn import param
from tenfold.nn.param import Tree
from tenfold.nn.stack import Placement
from tenfold.parallel.layout import Layout
from tenfold.parallel.sharding import make_mesh
from tenfold.train.batches import Batches, Source, packed_batches
from tenfold.train.checkpoints import CheckpointConfig
from tenfold.train.loss import full_training
from tenfold.train.optimizers import OptimizerConfig
from tenfold.train.trainer import Job, TrainConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
LENGTH, ROWS = 16, 8
SAVE_STEPS = 7


class Counting:
    """Rows of data: where to start, and how long to count."""

    def __len__(self) -> int:
        return 97

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"start": index % 23, "length": 2 + index % (LENGTH - 1)}

    def where(self, index: int) -> str:
        return f"counting, row {index}"


def encode(row: Mapping[str, Any]) -> Sequence[Example]:
    ids = [(row["start"] + i) % 23 for i in range(row["length"])]
    return [(ids, [True] * len(ids))]


def make_batches(seed: int = 0) -> Batches:
    source = Source(name="counting", records=Counting(), encode=encode)
    return packed_batches([source], rows=ROWS, length=LENGTH, seed=seed, pad_id=23)


def make_job(mesh: Mapping[str, int] | None = None) -> Job:
    model = resolve(CONFIG)
    declared = model.params(stacked=True)
    layout = Layout() if mesh is None else Layout(make_mesh(mesh))
    shardings = None if layout.mesh is None else param.shardings(declared, layout.mesh)
    return Job(
        loss=full_training(model, Placement(layout=layout)),
        declared=declared,
        initial=lambda: jax.device_put(draw(declared), shardings),
        shardings=shardings,
        layout=layout,
    )


def draw(declared: Tree) -> Tree:
    """Weights from numpy: compiling their initialisation would take longer than training them."""
    rng = np.random.default_rng(0)
    return param.map_params(
        lambda p: (rng.normal(0, 0.02, p.shape) if p.init == "normal" else np.ones(p.shape)).astype(np.float32),
        declared,
    )


def make_config(steps: int, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        steps=steps,
        optimizer=OptimizerConfig(learning_rate=0.02, schedule="cosine", warmup_steps=5),
        checkpoints=CheckpointConfig(save_steps=SAVE_STEPS, save_total_limit=2),
        plots=False,  # takes longer than the run
    )
    return replace(config, **changes)


if __name__ == "__main__":
    from tenfold.train.trainer import train

    jax.config.update("jax_numpy_dtype_promotion", "standard")  # optax multiplies floats with integers
    trained = train(make_job(), make_config(int(sys.argv[2])), make_batches(), Path(sys.argv[1]))
    print("finished" if trained.finished else f"stopped at {int(trained.state.step)}")
