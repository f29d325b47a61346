"""What PEFT makes of training runs of adapters: the loss of every step, as golden files.

    .venv-peers/bin/python -m tests.parity.lora_reference --write tests/train/golden

Llama of transformers with PEFT's adapters, in float32; AdamW of torch with a schedule of transformers. With `--save`,
the adapters are also written as PEFT writes them, before and after training; with `--score`, logits are written of an
adapter that PEFT loads.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from tests.parity.cases import Case
from tests.parity.lora_cases import ADAPTERS, STEPS, draw_tensor
from tests.parity.reference import dump, load_model, quiet, save_checkpoint
from tests.parity.training_cases import CONFIG, OPTIMIZER, make_documents
from tests.parity.training_reference import IGNORED, batch


def wrap(model: Any, name: str, seed: int) -> tuple[Any, dict[str, list[int]]]:
    """The model with drawn adapters, and the shapes of their tensors in files."""
    config = {"target_modules": "all-linear", **ADAPTERS[name]}
    wrapped = get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **config))
    shapes = {key: tuple(tensor.shape) for key, tensor in get_peft_model_state_dict(wrapped).items()}
    drawn = {key: torch.from_numpy(draw_tensor(key, shape, seed)) for key, shape in shapes.items()}
    set_peft_model_state_dict(wrapped, drawn)
    for key, tensor in get_peft_model_state_dict(wrapped).items():
        assert torch.equal(tensor, drawn[key]), key
    return wrapped.train(), {key: list(shape) for key, shape in sorted(shapes.items())}


def train(model: Any, seed: int) -> list[float]:
    """The losses of every step."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in trained if w.ndim > 1], "weight_decay": OPTIMIZER["weight_decay"]},
        {"params": [w for w in trained if w.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=OPTIMIZER["learning_rate"], betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]), eps=OPTIMIZER["eps"]
    )
    schedule = get_cosine_schedule_with_warmup(adamw, OPTIMIZER["warmup_steps"], STEPS)
    losses = []
    for step in range(STEPS):
        tokens, mask, targets = batch(make_documents(step, seed))
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIMIZER["max_grad_norm"])
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        losses.append(float(loss))
    return losses


def score(base: Path, adapter: Path) -> None:
    """Writes logits [T, V] of prompt.json to logits.npy in the adapter's directory."""
    model = PeftModel.from_pretrained(load_model(base), adapter).eval()
    prompt = json.loads((base / "prompt.json").read_text())
    with torch.inference_mode():
        np.save(adapter / "logits.npy", model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the directory for the golden files")
    parser.add_argument("--save", type=Path, help="a directory for the base and the trained adapters")
    parser.add_argument("--score", type=Path, nargs=2, help="a base and an adapter")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the documents")
    args = parser.parse_args()
    quiet()
    if args.score:
        score(*args.score)
        return
    args.write.mkdir(parents=True, exist_ok=True)
    for name in ADAPTERS:
        with tempfile.TemporaryDirectory() as path:
            base = args.save / "base" if args.save else Path(path)
            base.mkdir(parents=True, exist_ok=True)
            shapes = save_checkpoint(Case(name=name, config=CONFIG), args.seed, base)
            model, adapters = wrap(load_model(base), name, args.seed)
        losses = train(model, args.seed)
        if args.save:
            model.save_pretrained(args.save / name)
        versions = {module.__name__: module.__version__.split("+")[0] for module in (peft, torch, transformers)}
        content = {
            "made_with": versions,
            "seed": args.seed,
            "tensors": {key: list(shape) for key, shape in shapes.items()},
            "adapter_tensors": adapters,
            "losses": [round(loss, 7) for loss in losses],
        }
        dump(content, args.write / f"{name}.json")
        print(f"{name}: the loss falls from {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
