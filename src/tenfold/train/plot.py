"""Pictures of a run."""

import json
from pathlib import Path

from matplotlib.figure import Figure


def plot_loss(run_dir: Path) -> Path:
    """Draws `events.jsonl` as `loss.png`: the loss, and every evaluated number on a second scale."""
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    left.plot([e["step"] for e in events], [e["loss"] for e in events], linewidth=0.8, label="loss")
    left.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    right = left.twinx()
    evaluated = sorted({name for e in events for name in e} - {"step", "loss", "tokens_per_s"})
    for n, name in enumerate(evaluated):
        points = [(e["step"], e[name]) for e in events if name in e]
        right.plot(*zip(*points, strict=True), "o-", color=f"C{n + 1}", label=name)
    right.set(ylim=(0, 1.02))
    figure.legend(loc="outside upper right", ncols=1 + len(evaluated))
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=120)
    return path
