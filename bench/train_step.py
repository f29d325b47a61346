"""A training step against transformers on torch, eager and compiled: one run, taking turns, medians of several.

A random Llama of 25 M weights in float32, rows of 512 tokens, AdamW with clipping, on two threads. Each side is a
process of its own; all train on the same tokens, and their losses of the first step must agree.

Then our trainer trains the same model on the standard library's source, which is tokenised and packed meanwhile, and
says for how much of a step it waits for its data.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
SIDES = {
    "tenfold": sys.executable,
    "eager": ROOT / ".venv-peers/bin/python",
    "compiled": ROOT / ".venv-peers/bin/python",
}
ASKED = 1.3
MOST_WAITED = 0.02  # of a step, for data
THREADS = 2
LENGTH = 512
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 20_000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
SMALL = MODEL | {"vocab_size": 500, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-4, 0.1, 1.0


def make_tokens(rows: int, vocab: int) -> Any:
    """The batch of every step [rows, LENGTH]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, vocab, (rows, LENGTH), dtype=np.int64)


def tenfold_step(config: dict[str, Any], rows: int, weights: Path) -> Callable[[], float]:
    """A function that does a step and gives its loss."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tenfold.base.allocator import keep_freed_memory
    from tenfold.data.packing import Rows
    from tenfold.models.family import resolve
    from tenfold.nn import checkpoint
    from tenfold.nn.stack import Placement
    from tenfold.train.loss import full_training
    from tenfold.train.optimizers import OptimizerConfig, make_optimizer
    from tenfold.train.state import init_state
    from tenfold.train.step import accumulate, make_step

    keep_freed_memory()  # as the trainer does
    model = resolve(config)
    declared = model.params(stacked=True)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY), 10**6, declared
    )
    state = init_state(optimizer, checkpoint.load(weights, declared, jnp.float32))
    loss = full_training(model, Placement(unroll=True))  # as by --unroll-layers; torch's layers are, too
    step = jax.jit(make_step(accumulate(loss), optimizer, clip_norm=CLIP), donate_argnums=0)
    tokens = make_tokens(rows, config["vocab_size"]).astype(np.int32)
    at = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    batch = Rows(tokens, np.ones_like(tokens), at, np.ones(tokens.shape, np.float32))

    def run() -> float:
        nonlocal state
        state, metrics = step(state, {}, batch)
        return float(metrics["loss"])

    return run


def torch_adamw(model: Any) -> Any:
    """AdamW as ours: without decay of vectors."""
    import torch

    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in weights if w.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def torch_step(config: dict[str, Any], rows: int, weights: Path, *, compiled: bool) -> Callable[[], float]:
    """A function that does a step and gives its loss."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).train()
    adamw = torch_adamw(model)
    tokens = torch.from_numpy(make_tokens(rows, config["vocab_size"]))

    def loss_of(tokens: Any) -> Any:
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))

    measured = torch.compile(loss_of) if compiled else loss_of

    def run() -> float:
        adamw.zero_grad(set_to_none=True)
        loss = measured(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        return float(loss.detach())

    return run


def data_wait(config: dict[str, Any], rows: int, steps: int) -> float:
    """The share of a step that the trainer waits for data that is tokenised as it trains; the mean over all but the
    first step, which compiles and fills the buffers."""
    import jax
    import jax.numpy as jnp

    from tenfold.base.builtin import builtin_model
    from tenfold.data.records import open_records
    from tenfold.data.tokenizer import Tokenizer
    from tenfold.models.family import resolve
    from tenfold.nn import param
    from tenfold.train.batches import Source, encode_text, packed_batches
    from tenfold.train.events import read_events
    from tenfold.train.loss import full_training
    from tenfold.train.pico.corpus import sources
    from tenfold.train.trainer import Job, TrainConfig, train

    tokenizer = Tokenizer.load(builtin_model())
    model = resolve(config | {"vocab_size": max(config["vocab_size"], tokenizer.vocab_size)})
    declared = model.params(stacked=True)
    job = Job(
        loss=full_training(model),
        declared=declared,
        initial=lambda: param.initialize(declared, jax.random.key(0), jnp.float32),
    )
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in sources()), encoding="utf-8")
        source = Source(
            name="sources", records=open_records(corpus, {"text": str}), encode=encode_text(tokenizer, LENGTH)
        )
        batches = packed_batches([source], rows=rows, length=LENGTH, seed=0)
        train(job, TrainConfig(steps=steps, plots=False), batches, Path(directory) / "run")
        batches.close()
        shares = [event["data_share"] for event in read_events(Path(directory) / "run") if "data_share" in event]
    return statistics.mean(shares[1:])


def work(side: str, config: dict[str, Any], rows: int, weights: Path) -> None:
    """Answers every line of input, a number of steps, with their seconds each and the first one's loss."""
    if side == "tenfold":
        run = tenfold_step(config, rows, weights)
    else:
        run = torch_step(config, rows, weights, compiled=side == "compiled")
    for line in sys.stdin:
        started = time.perf_counter()
        losses = [run() for _ in range(int(line))]
        print(json.dumps({"seconds": (time.perf_counter() - started) / len(losses), "loss": losses[0]}), flush=True)


def write_weights(config: dict[str, Any], path: Path) -> None:
    """A checkpoint of random weights that all sides start from."""
    import jax
    import jax.numpy as jnp

    from tenfold.models.family import resolve
    from tenfold.nn import checkpoint, param

    declared = resolve(config).params()
    weights = param.initialize(declared, jax.random.key(0), jnp.float32)
    checkpoint.export(path, declared, weights, config=config, dtype=jnp.float32)


class Side:
    """A worker behind a pipe."""

    def __init__(self, name: str, arguments: list[str]) -> None:
        command = [str(SIDES[name]), __file__, "--worker", name, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, steps: int) -> dict[str, float]:
        """Seconds of a step, and the loss of the first."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(steps, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def main() -> None:
    """Prints medians and, last, the ratio to the better one of torch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="in a turn")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--data-steps", type=int, default=80, help="that waiting for data is measured over; 0 does not")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--weights", type=Path, default=ROOT / "build" / "bench-train")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    config, weights = (SMALL, args.weights / "small") if args.small else (MODEL, args.weights / "25m")
    if args.worker:
        work(args.worker, config, args.rows, weights)
        return
    if not weights.exists():
        write_weights(config, weights)
    shared = ["--rows", str(args.rows), "--weights", str(args.weights), *(["--small"] if args.small else [])]
    sides = {name: Side(name, shared) for name in args.sides}
    first = {name: side.run(1)["loss"] for name, side in sides.items()}
    for side in sides.values():
        side.run(2)  # warm
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            times[name].append(side.run(args.steps)["seconds"])
    for side in sides.values():
        side.close()
    print(f"{'side':10s}{'first loss':>12s}{'s per step':>12s}{'tokens/s':>12s}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:10s}{first[name]:12.5f}{median:12.4f}{args.rows * LENGTH / median:12.0f}")
    if max(first.values()) - min(first.values()) > 1e-4:
        raise SystemExit("the losses of the first step differ: the sides do not do the same")
    if "tenfold" in times and len(times) > 1:
        better = [min(others) for others in zip(*(t for name, t in times.items() if name != "tenfold"), strict=True)]
        ratio = statistics.median(theirs / ours for ours, theirs in zip(times["tenfold"], better, strict=True))
        print(f"ratio to the better one of torch: {ratio:.2f}x (asked: {ASKED}x)")
    if args.data_steps:
        waited = data_wait(config, args.rows, args.data_steps)
        print(f"waiting for data: {waited:.2%} of a step (asked: below {MOST_WAITED:.0%})")


if __name__ == "__main__":
    main()
