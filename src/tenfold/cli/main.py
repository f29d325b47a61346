"""`tenfold`: the commands, each a module of its own that is imported when it runs."""

import sys

import typer

from tenfold.cli.doctor import doctor
from tenfold.cli.merge import merge
from tenfold.cli.models import models
from tenfold.cli.quantize import quantize
from tenfold.cli.serve import serve
from tenfold.cli.train import train

app = typer.Typer(
    name="tenfold",
    help="Train and serve language models in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(doctor)
app.command()(models)
app.command()(quantize)
app.command()(merge)
app.add_typer(train, name="train")


def _show_version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        print(importlib.metadata.version("tenfold"))
        raise typer.Exit


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
