"""Fine-tunes tiny models by every recipe, perhaps as one of several hosts, and says their losses as JSON: for
`test_recipes_on_hosts`.

python -m tests.train.recipes_on_hosts SHARED OUTPUT MESH
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from tenfold.nn.lora import LoraConfig
from tenfold.parallel.hosts import joined_hosts
from tenfold.train.adapters import TuningConfig
from tenfold.train.distill import DistillConfig, distill
from tenfold.train.dpo import DpoConfig, dpo
from tenfold.train.embed import EmbedConfig, embed
from tenfold.train.events import read_events
from tenfold.train.optimizers import OptimizerConfig
from tenfold.train.parallelism import Parallelism
from tenfold.train.pretrain import Dataset
from tenfold.train.sft import SftConfig, sft
from tenfold.train.trainer import TrainConfig, Trained


def recipes(shared: Path, mesh: str) -> Mapping[str, Callable[[Path], Trained]]:
    """Each recipe, to be given where to write."""
    optimizer = OptimizerConfig(learning_rate=0.01, schedule="constant", weight_decay=0.0)
    run = TrainConfig(steps=2, plots=False, optimizer=optimizer, parallelism=Parallelism(mesh=mesh))
    given: dict[str, Any] = {"model": str(shared / "model"), "max_length": 32, "batch_size": 4}
    whole = TuningConfig(training=run, **given)
    lora = TuningConfig(training=run, lora=LoraConfig(r=2, use_dora=True), **given)
    chats, pairs, texts = (Dataset(where=str(shared / f"{name}.jsonl")) for name in ("chats", "pairs", "texts"))
    answers = SftConfig(tuning=lora, datasets=(chats,), validation=chats, eval_batches=1)
    taught = DistillConfig(sft=SftConfig(tuning=whole, datasets=(chats,)), teacher=str(shared / "teacher"))
    return {
        "sft": lambda output: sft(answers, output),
        "dpo": lambda output: dpo(DpoConfig(tuning=lora, dataset=pairs), output),
        "distill": lambda output: distill(taught, output),
        "embed": lambda output: embed(EmbedConfig(tuning=whole, dataset=texts, negatives=1), output),
    }


if __name__ == "__main__":
    jax.config.update("jax_numpy_dtype_promotion", "standard")  # optax multiplies floats with integers
    shared, output, mesh = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    found: dict[str, list[float]] = {}
    with joined_hosts():
        for name, recipe in recipes(shared, mesh).items():
            assert recipe(output / name).finished
            found[name] = [event.get("loss", event.get("eval_loss")) for event in read_events(output / name)]
    print(json.dumps(found))
