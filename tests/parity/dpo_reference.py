"""What TRL makes of pairs of answers: the loss and its gradient's norm, as a golden file.

    .venv-peers/bin/python -m tests.parity.dpo_reference --write tests/train/golden

The loss is that of TRL's own DPOTrainer; the log-probabilities that it is given are those of a Llama of transformers.
"""

import argparse
import collections
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
import trl
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

from tests.parity.cases import Case
from tests.parity.dpo_cases import LOSSES, REFERENCE_SEED, make_pairs
from tests.parity.reference import dump, load_model, quiet, save_checkpoint
from tests.parity.training_cases import CONFIG


class Scored(torch.nn.Module):
    """A model that answers as TRL's loss wants it to: with the log-probability of every label."""

    is_gradient_checkpointing = False

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any, **_: Any) -> SimpleNamespace:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
        targets = labels[:, 1:]
        known = targets != -100
        picked = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        nothing = torch.zeros_like(picked)
        return SimpleNamespace(
            log_probs=torch.where(known, picked, nothing),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=torch.zeros_like(known),
        )


class Alone:
    """What TRL asks of accelerate, where there is one process."""

    device = torch.device("cpu")

    def gather(self, tensor: Any) -> Any:
        return tensor

    gather_for_metrics = gather


def trainer(policy: Any, reference: Any, kind: str, beta: float) -> Any:
    """A trainer with nothing but what its loss reads; the rest is the default of TRL's configuration."""
    made = DPOTrainer.__new__(DPOTrainer)
    made.__dict__.update(
        accelerator=Alone(),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        model=policy,
        ref_model=reference,
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        use_weighting=False,
        _metrics={"train": collections.defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    return made


def score(seed: int) -> dict[str, Any]:
    """By the name of a loss: its mean over the pairs, and the norm of the gradient."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as path:
        policy_at, reference_at = Path(path) / "policy", Path(path) / "reference"
        for directory, of in ((policy_at, seed), (reference_at, seed + REFERENCE_SEED)):
            directory.mkdir()
            shapes = save_checkpoint(Case(name="dpo", config=CONFIG), of, directory)
        reference = Scored(load_model(reference_at))
        for kind, options in LOSSES.items():
            policy = Scored(load_model(policy_at)).train()
            examples = [
                {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
                for prompt, chosen, rejected in make_pairs(seed)
            ]
            batch = DataCollatorForPreference(pad_token_id=0)(examples)
            loss = trainer(policy, reference, kind, **options)._compute_loss(policy, batch, return_outputs=False)
            loss.backward()
            squares = [w.grad.square().sum() for w in policy.parameters() if w.grad is not None]
            found[kind] = {
                "loss": round(float(loss), 7),
                "grad_norm": round(float(torch.stack(squares).sum().sqrt()), 7),
            }
    return {"tensors": {key: list(shape) for key, shape in shapes.items()}, "losses": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, required=True, help="the directory for the golden file")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the pairs")
    args = parser.parse_args()
    quiet()
    args.write.mkdir(parents=True, exist_ok=True)
    versions = {module.__name__: module.__version__.split("+")[0] for module in (torch, transformers, trl)}
    content = {"made_with": versions, "seed": args.seed, **score(args.seed)}
    dump(content, args.write / "dpo.json")
    print(content["losses"])


if __name__ == "__main__":
    main()
