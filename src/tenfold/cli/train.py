"""`tenfold train`: recipes that make models."""

from typing import TYPE_CHECKING

import typer

from tenfold.cli import training as options
from tenfold.cli.distill import distill
from tenfold.cli.dpo import dpo
from tenfold.cli.embed import embed
from tenfold.cli.sft import sft

if TYPE_CHECKING:
    from tenfold.train.trainer import TrainConfig

train = typer.Typer(help="Train models.", no_args_is_help=True)
train.command()(sft)
train.command()(dpo)
train.command()(distill)
train.command()(embed)


@train.callback()
def recipes() -> None:
    """Train models."""


@train.command()
@options.trains()
def pretrain(
    output: options.Output,
    dataset: options.Datasets,
    training: "TrainConfig",
    model: str = typer.Option(
        ..., "--model", help="A directory, a Hugging Face id or a URI: a checkpoint with a tokenizer."
    ),
    from_scratch: bool = typer.Option(
        False, "--from-scratch", help="Start from random weights; then a config.json and a tokenizer do for --model."
    ),
    dataset_weight: options.Weights = None,
    split: options.Split = "train",
    validation: options.Validation = None,
    text_column: str = typer.Option("text", help="Column of the texts.", rich_help_panel="Data"),
    max_length: options.MaxLength = "1024",
    batch_size: options.BatchSize = 8,
    seed: options.Seed = 0,
    plan: options.Plan = False,
) -> None:
    """Train on documents: next-token prediction, from a checkpoint or from random weights."""
    from tenfold.cli.quantities import parse_count
    from tenfold.train.pretrain import Dataset, PretrainConfig, plan_pretraining
    from tenfold.train.pretrain import pretrain as run

    weights = options.dataset_weights(dataset, dataset_weight)
    config = PretrainConfig(
        model=model,
        from_scratch=from_scratch,
        datasets=tuple(Dataset(where=d, weight=w, split=split) for d, w in zip(dataset, weights, strict=True)),
        validation=None if validation is None else Dataset(where=validation, split=split),
        text_column=text_column,
        max_length=parse_count(max_length),
        batch_size=batch_size,
        seed=seed,
        training=training,
    )
    if plan:
        print(plan_pretraining(config))
        return
    options.say_how_it_ended(run(config, output), output)


@train.command()
def evaluate(
    dataset: str = typer.Option(..., help="Held-out documents, like those of pretrain."),
    model: str = typer.Option(..., help="A directory, a Hugging Face id or a URI of a checkpoint."),
    split: options.Split = "train",
    text_column: str = typer.Option("text", help="Column of the texts."),
    max_length: options.MaxLength = "1024",
    batch_size: options.BatchSize = 8,
    eval_batches: int = typer.Option(16, min=1, help="Batches to measure on, at most."),
    dtype: options.DtypeName = options.Dtype.FLOAT32,
) -> None:
    """Measure a checkpoint's perplexity on documents."""
    from tenfold.cli.quantities import parse_count
    from tenfold.train.pretrain import Dataset, evaluate_model

    found = evaluate_model(
        model,
        Dataset(where=dataset, split=split),
        text_column=text_column,
        max_length=parse_count(max_length),
        batch_size=batch_size,
        eval_batches=eval_batches,
        dtype=str(dtype),
    )
    print(f"loss {found['eval_loss']:.4f}, perplexity {found['eval_perplexity']:.3f}")


@train.command()
def pico(
    output: options.Output,
    seed: int = typer.Option(0, help="Of the weights and of the order of the examples."),
) -> None:
    """Train the built-in model anew: the standard library's docstrings, in about an hour on two cores."""
    from tenfold.train.pico.recipe import make

    options.say_how_it_ended(make(output, seed=seed), output)
