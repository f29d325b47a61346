"""`tenfold train dpo`: direct preference optimisation."""

from enum import StrEnum
from typing import TYPE_CHECKING

import typer

from tenfold.cli import training as options
from tenfold.cli.tuning import Dataset, Format, FormatName, tunes

if TYPE_CHECKING:
    from tenfold.train.adapters import TuningConfig


class PreferenceLoss(StrEnum):
    """Losses of a pair."""

    SIGMOID = "sigmoid"
    HINGE = "hinge"
    IPO = "ipo"


@tunes(learning_rate=1e-6, weight_decay=0.0)
def dpo(
    output: options.Output,
    dataset: Dataset,
    tuning: "TuningConfig",
    split: options.Split = "train",
    format_name: FormatName = Format.MESSAGES,
    loss_type: PreferenceLoss = typer.Option(PreferenceLoss.SIGMOID, help="Of a pair of answers."),
    beta: float = typer.Option(0.1, help="How strongly the model as it was holds."),
    label_smoothing: float = typer.Option(0.0, help="Share of pairs taken for wrongly labelled; of sigmoid only."),
) -> None:
    """Fine-tune on preferences: rows with a chosen and a rejected conversation, or a prompt and two completions."""
    from tenfold.train import pretrain
    from tenfold.train.dpo import DpoConfig
    from tenfold.train.dpo import dpo as run

    config = DpoConfig(
        tuning=tuning,
        dataset=pretrain.Dataset(where=dataset, split=split),
        format=str(format_name),
        loss=str(loss_type),
        beta=beta,
        label_smoothing=label_smoothing,
    )
    options.say_how_it_ended(run(config, output), output)
