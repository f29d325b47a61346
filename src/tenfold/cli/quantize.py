"""`tenfold quantize`: a checkpoint in fewer bits, and what that costs in perplexity."""

from enum import StrEnum
from pathlib import Path

import typer


class QuantizationScheme(StrEnum):
    """How weights are rounded."""

    INT8 = "int8"
    INT4 = "int4"


def quantize(
    model: str = typer.Argument(
        "", help="A directory, a Hugging Face id, or a gs://, s3:// or file:// URI; if left out, pico, built in."
    ),
    output: Path = typer.Option(..., "--output", "-o", help="Directory for the quantised checkpoint."),
    scheme: QuantizationScheme = typer.Option(
        QuantizationScheme.INT4, help="int8: a scale per output. int4: a scale per 64 inputs of each output."
    ),
    calibration: Path | None = typer.Option(
        None,
        help="Text like what the model will see: a .txt file, or .jsonl of strings or of objects with a text. "
        "If left out, the sources of Python's standard library.",
    ),
    samples: int = typer.Option(128, min=1, help="Rows of 512 tokens to calibrate with."),
    seed: int = typer.Option(0, help="Of the choice of rows."),
) -> None:
    """Quantise a checkpoint with calibration, for `tenfold serve` and for transformers.

    Weights are rounded by GPTQ and written in the compressed-tensors format. Perplexity is measured before and after,
    on text that is held out of calibration.
    """
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from tenfold.base.builtin import builtin_model
    from tenfold.base.storage import fetch
    from tenfold.train.calibration import read_texts, standard_library
    from tenfold.train.quantize import quantize_checkpoint

    texts = standard_library() if calibration is None else read_texts(calibration)
    path = fetch(model, progress=True) if model else builtin_model()
    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("quantising", total=None)
        done = quantize_checkpoint(
            path,
            output,
            texts,
            scheme=scheme,
            samples=samples,
            seed=seed,
            report=lambda count, total: progress.update(task, completed=count, total=total),
        )
    table = Table(
        caption=f"calibrated on {done.calibration_tokens:,} tokens, measured on {done.held_out_tokens:,} others"
    )
    for column in ("weights", "MiB", "perplexity", "change"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    table.add_row("as they were", f"{done.bytes_before / 2**20:.1f}", f"{done.before:.3f}", "")
    change = f"{done.after / done.before - 1:+.2%}"
    table.add_row(str(scheme), f"{done.bytes_after / 2**20:.1f}", f"{done.after:.3f}", change)
    Console().print(table)
    print(f"Serve it with: tenfold serve {output}")
