"""Pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.train.events import read_events


def plot_run(run_dir: Path) -> list[Path]:
    """Draws a run's events as `loss` and `grad_norm`, each as PNG and SVG; the evaluated numbers beside the loss."""
    events = read_events(run_dir)
    steps = [event for event in events if "loss" in event]
    evaluated = [event for event in events if "loss" not in event and "why" not in event]
    drawn = [*_draw(run_dir / "loss", "loss", "loss (nats per token)", steps, evaluated)]
    return drawn + _draw(run_dir / "grad_norm", "grad_norm", "norm of the gradient", steps, [])


def _draw(
    path: Path, name: str, label: str, steps: Sequence[dict[str, Any]], evaluated: Sequence[dict[str, Any]]
) -> list[Path]:
    from matplotlib.figure import Figure  # noqa: PLC0415 -- slow to import, and needed once

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    left.plot([e["step"] for e in steps], [e[name] for e in steps], linewidth=0.8, label=name)
    left.set(xlabel="step", ylabel=label, yscale="log")
    names = sorted({key for event in evaluated for key in event} - {"step"})
    if names:
        right = left.twinx()
        for n, key in enumerate(names):
            points = [(e["step"], e[key]) for e in evaluated if key in e]
            right.plot(*zip(*points, strict=True), "o-", color=f"C{n + 1}", label=key)
    figure.legend(loc="outside upper right", ncols=1 + len(names))
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=120)
    return files
