"""`tenfold merge`: a checkpoint with an adapter merged into it."""

from pathlib import Path

import typer


def merge(
    base: str = typer.Argument(help="The model: a directory, a Hugging Face id or a URI; pico is built in."),
    adapter: str = typer.Argument(help="The adapter, in PEFT's layout: a directory, a Hugging Face id or a URI."),
    output: Path = typer.Option(..., "--output", "-o", help="Directory for the merged checkpoint."),
) -> None:
    """Merge an adapter into the model that it was trained on, for whatever serves checkpoints.

    One tensor is in memory at a time, and every tensor keeps its dtype.
    """
    from tenfold.base.adapter import ADAPTER_FILES
    from tenfold.base.builtin import BUILTIN_MODEL, builtin_model
    from tenfold.base.storage import fetch
    from tenfold.models.family import resolve
    from tenfold.nn import adapter_checkpoint, checkpoint

    path = builtin_model() if base == BUILTIN_MODEL else fetch(base, progress=True)
    tree = resolve(checkpoint.read_config(path)).params()
    adapter_checkpoint.merge(path, fetch(adapter, files=ADAPTER_FILES), output, tree)
    print(f"Serve it with: tenfold serve {output}")
