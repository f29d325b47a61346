"""`tenfold`: the commands, each a module of its own that imports what it needs when it runs."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from tenfold.cli.doctor import doctor
from tenfold.cli.merge import merge
from tenfold.cli.models import models
from tenfold.cli.quantize import quantize
from tenfold.cli.serve import serve
from tenfold.cli.train import train


class CommandList(TyperGroup):
    """The list of commands in plain text: importing rich, for the frames, would take longer than all else."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write what a group of click's would."""
        super(TyperGroup, self).format_help(ctx, formatter)


app = typer.Typer(
    name="tenfold",
    cls=CommandList,
    help="Train and serve language models in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command(short_help="Check that Tenfold works on this machine.")(doctor)
app.command(short_help="Show the supported architectures.")(models)
app.command(short_help="Quantise a checkpoint with calibration.")(quantize)
app.command(short_help="Merge an adapter into its model.")(merge)
app.add_typer(train, name="train")


def _show_version(wanted: bool) -> bool:
    if wanted:
        import importlib.metadata

        print(importlib.metadata.version("tenfold"))
        raise typer.Exit
    return wanted


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    """Train and serve language models in JAX."""


def main() -> None:
    """Run the command line; a deliberate error is one line on standard error, and exit status 1."""
    from tenfold.base.errors import TenfoldError

    try:
        app()
    except TenfoldError as error:
        print(f"tenfold: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
