"""What torch makes of a training run: the loss and the gradient's norm of every step, as a golden file.

    .venv-peers/bin/python -m tests.parity.training_reference --write tests/train/golden

Llama of transformers, in float32, one document at a row and padding masked; AdamW of torch with a schedule of
transformers. Running it twice on one machine writes the same bytes.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import get_cosine_schedule_with_warmup

from tests.parity.cases import Case
from tests.parity.reference import dump, load_model, quiet, save_checkpoint
from tests.parity.training_cases import CONFIG, OPTIMIZER, STEPS, make_documents

IGNORED = -100


def batch(documents: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, attention mask and targets [documents, longest], padded at the right; the last token predicts nothing."""
    longest = max(map(len, documents))
    tokens, targets = (torch.full((len(documents), longest), fill) for fill in (0, IGNORED))
    mask = torch.zeros_like(tokens)
    for i, document in enumerate(documents):
        tokens[i, : len(document)] = torch.tensor(document)
        mask[i, : len(document)] = 1
        targets[i, : len(document) - 1] = torch.tensor(document[1:])
    return tokens, mask, targets


def train(model: Any, seed: int) -> tuple[list[float], list[float]]:
    """The losses and the gradients' norms, before clipping, of every step."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    groups = [
        {"params": [w for _, w in named if w.ndim > 1], "weight_decay": OPTIMIZER["weight_decay"]},
        {"params": [w for _, w in named if w.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        groups, lr=OPTIMIZER["learning_rate"], betas=(OPTIMIZER["b1"], OPTIMIZER["b2"]), eps=OPTIMIZER["eps"]
    )
    schedule = get_cosine_schedule_with_warmup(adamw, OPTIMIZER["warmup_steps"], STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        tokens, mask, targets = batch(make_documents(step, seed))
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=IGNORED)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["max_grad_norm"])))
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        losses.append(float(loss))
    return losses, norms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, required=True, help="the directory for the golden file")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the documents")
    args = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as path:
        shapes = save_checkpoint(Case(name="llama-adamw", config=CONFIG), args.seed, Path(path))
        model = load_model(Path(path)).train()
    losses, norms = train(model, args.seed)
    args.write.mkdir(parents=True, exist_ok=True)
    content = {
        "made_with": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "seed": args.seed,
        "tensors": {name: list(shape) for name, shape in shapes.items()},
        "losses": [round(loss, 7) for loss in losses],
        "grad_norms": [round(norm, 7) for norm in norms],
    }
    dump(content, args.write / "llama-adamw.json")
    print(f"the loss falls from {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
