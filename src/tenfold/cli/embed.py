"""`tenfold train embed`: contrastive training of encoders."""

from enum import StrEnum
from typing import TYPE_CHECKING

import typer

from tenfold.cli import training as options
from tenfold.cli.tuning import Dataset, tunes

if TYPE_CHECKING:
    from tenfold.train.adapters import TuningConfig


class Pooling(StrEnum):
    """What of the hidden states is a text's embedding."""

    MEAN = "mean"
    LAST = "last"


@tunes(learning_rate=2e-5, weight_decay=0.0)
def embed(
    output: options.Output,
    dataset: Dataset,
    tuning: "TuningConfig",
    split: options.Split = "train",
    negatives: int = typer.Option(0, min=0, help="Hard negatives of each query, out of the row's list."),
    pooling: Pooling = typer.Option(Pooling.MEAN, help="The mean of the hidden states, or the last one."),
    temperature: float = typer.Option(0.05, help="That similarities are divided by."),
    chunk: int | None = typer.Option(
        None, min=1, help="Texts whose activations are in memory at a time; gradients stay those of the whole batch."
    ),
) -> None:
    """Train an encoder on rows with a query, a positive and perhaps negatives.

    The passages of other rows are negatives, too.
    """
    from tenfold.train import pretrain
    from tenfold.train.embed import EmbedConfig
    from tenfold.train.embed import embed as run

    config = EmbedConfig(
        tuning=tuning,
        dataset=pretrain.Dataset(where=dataset, split=split),
        negatives=negatives,
        pooling=str(pooling),
        temperature=temperature,
        chunk=chunk,
    )
    options.say_how_it_ended(run(config, output), output)
