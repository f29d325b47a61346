"""`tenfold train`: the recipes of this project's own models."""

from pathlib import Path

import typer

train = typer.Typer(help="Train one of this project's own models.", no_args_is_help=True)


@train.callback()
def recipes() -> None:
    """Train one of this project's own models."""


@train.command()
def pico(
    output: Path = typer.Option(..., "--output", "-o", help="Directory for the model, its events and its loss plot."),
    seed: int = typer.Option(0, help="Of the weights and of the order of the examples."),
) -> None:
    """Train the built-in model anew: the standard library's docstrings, in about an hour on two cores."""
    from tenfold.train.pico.recipe import make

    print(f"The model is in {make(output, seed=seed)}. Serve it with: tenfold serve {output}/model")
