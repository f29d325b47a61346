"""`tenfold train distill`: a model that learns from a larger one."""

from enum import StrEnum
from typing import TYPE_CHECKING

import typer

from tenfold.cli import training as options
from tenfold.cli.tuning import Format, FormatName, tunes

if TYPE_CHECKING:
    from tenfold.train.adapters import TuningConfig


class Divergence(StrEnum):
    """Which way round distributions are compared."""

    FORWARD = "forward"
    REVERSE = "reverse"


@tunes(learning_rate=2e-5, weight_decay=0.0)
def distill(
    output: options.Output,
    dataset: options.Datasets,
    tuning: "TuningConfig",
    teacher: str = typer.Option(..., help="A directory, a Hugging Face id or a URI of a model of the same vocabulary."),
    dataset_weight: options.Weights = None,
    split: options.Split = "train",
    format_name: FormatName = Format.MESSAGES,
    divergence: Divergence = typer.Option(Divergence.FORWARD, help="Forward: of the student from the teacher."),
    temperature: float = typer.Option(1.0, help="Of both distributions."),
    alpha: float = typer.Option(0.5, help="Share of the divergence in the loss; the rest is cross-entropy."),
) -> None:
    """Distil a teacher: its probabilities of the answers are learned, along with the answers."""
    from tenfold.train.distill import DistillConfig
    from tenfold.train.distill import distill as run
    from tenfold.train.pretrain import Dataset
    from tenfold.train.sft import SftConfig

    weights = options.dataset_weights(dataset, dataset_weight)
    datasets = tuple(Dataset(where=d, weight=w, split=split) for d, w in zip(dataset, weights, strict=True))
    config = DistillConfig(
        sft=SftConfig(tuning=tuning, datasets=datasets, format=str(format_name)),
        teacher=teacher,
        divergence=str(divergence),
        temperature=temperature,
        alpha=alpha,
    )
    options.say_how_it_ended(run(config, output), output)
