"""A training step on a GPU: model-FLOPs utilisation, and that of transformers on torch, eager and compiled, beside it.

A random Llama of the shapes of 3.2 1B, rows of 4,096 tokens, float32 weights that are computed with in bfloat16, AdamW
with clipping. Sides run one after the other, each in a process of its own with the whole card; --repeats goes round
again. Utilisation is of the card's stated rate (`tenfold.train.flops`), with the same count of operations for all.

Give --peer-python an interpreter with torch, built for the card, and transformers; without, only ours is measured.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_step import CLIP, LEARNING_RATE, WEIGHT_DECAY, torch_adamw

ASKED = 0.45
MODEL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def make_tokens(rows: int, length: int) -> Any:
    """The batch of every step [rows, length]."""
    import numpy as np

    return np.random.default_rng(0).integers(0, MODEL["vocab_size"], (rows, length), dtype=np.int64)


def tenfold_step(rows: int, length: int, remat: str, *, fp8: bool) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    """A function that starts a step, and one that waits for its loss."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tenfold.data.packing import Rows
    from tenfold.models.family import resolve
    from tenfold.nn import param
    from tenfold.nn.stack import Placement
    from tenfold.train.loss import full_training
    from tenfold.train.optimizers import OptimizerConfig, make_optimizer
    from tenfold.train.state import init_state
    from tenfold.train.step import accumulate, make_step

    model = resolve(MODEL)
    declared = model.params(stacked=True)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY), 10**6, declared
    )
    state = init_state(optimizer, param.initialize(declared, jax.random.key(0), jnp.float32))
    loss = full_training(model, Placement(remat=remat, unroll=True, fp8=fp8))  # pyright: ignore[reportArgumentType] -- one of its names
    step = jax.jit(make_step(accumulate(loss), optimizer, clip_norm=CLIP, compute_dtype=jnp.bfloat16), donate_argnums=0)
    tokens = make_tokens(rows, length).astype(np.int32)
    at = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = jax.device_put(Rows(tokens, np.ones_like(tokens), at, np.ones(tokens.shape, np.float32)))

    def start() -> Any:
        nonlocal state
        state, metrics = step(state, {}, batch)
        return metrics["loss"]

    return start, float


def torch_step(rows: int, length: int, *, compiled: bool) -> tuple[Callable[[], Any], Callable[[Any], float]]:
    """A function that starts a step, and one that waits for its loss."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.set_float32_matmul_precision("high")
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**MODEL), dtype=torch.float32).train()
    adamw = torch_adamw(model)
    tokens = torch.from_numpy(make_tokens(rows, length)).cuda()

    def loss_of(tokens: Any) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), tokens[:, 1:].reshape(-1))

    measured = torch.compile(loss_of) if compiled else loss_of

    def start() -> Any:
        adamw.zero_grad(set_to_none=True)
        loss = measured(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adamw.step()
        return loss.detach()

    return start, float


def work(side: str, rows: int, length: int, steps: int, remat: str) -> None:
    """Prints the seconds of a step and the first loss."""
    if side.startswith("tenfold"):
        start, wait = tenfold_step(rows, length, remat, fp8=side == "tenfold fp8")
    else:
        start, wait = torch_step(rows, length, compiled=side == "torch compiled")
    first = wait(start())
    wait(start())
    began = time.perf_counter()
    for _ in range(steps - 1):
        start()
    wait(start())
    print(json.dumps({"seconds": (time.perf_counter() - began) / steps, "loss": first}))


def report(times: dict[str, list[float]], losses: dict[str, float], rows: int, length: int) -> None:
    """Prints a table of medians and, last, the utilisation."""
    import jax

    from tenfold.models.family import resolve
    from tenfold.train.flops import flops_per_token, peak_flops

    operations = flops_per_token(resolve(MODEL), length) * rows * length
    peak = peak_flops("bfloat16")
    print(f"{jax.devices()[0].device_kind}, {peak / 1e12:.0f} TFLOP/s stated; a step is {operations / 1e12:.0f} TFLOP")
    print(f"{'side':18s}{'first loss':>12s}{'ms per step':>14s}{'tokens/s':>12s}{'utilisation':>14s}")
    for side, seconds in times.items():
        median = statistics.median(seconds)
        utilisation = operations / median / peak
        print(f"{side:18s}{losses[side]:12.4f}{1e3 * median:14.1f}{rows * length / median:12.0f}{utilisation:14.1%}")
    ours = operations / statistics.median(times["tenfold"]) / peak
    print(f"model-FLOPs utilisation: {ours:.1%} (asked: {ASKED:.0%})")


def main() -> None:
    """Runs every side and prints what `report` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="that are timed together")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--fp8", action="store_true", help="also with the products of linear layers in 8-bit floats")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.rows, args.length, args.steps, args.remat)
        return
    pythons = {side: Path(sys.executable) for side in ("tenfold", *(["tenfold fp8"] if args.fp8 else []))}
    if args.peer_python:
        pythons |= {"torch": args.peer_python, "torch compiled": args.peer_python}
    times: dict[str, list[float]] = {side: [] for side in pythons}
    losses: dict[str, float] = {}
    options = [
        f"--{name}={value}" for name, value in vars(args).items() if name in ("rows", "length", "steps", "remat")
    ]
    for _ in range(args.repeats):
        for side, python in pythons.items():
            command = [str(python), __file__, "--worker", side, *options]
            out = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            times[side].append(out["seconds"])
            losses[side] = out["loss"]
    report(times, losses, args.rows, args.length)


if __name__ == "__main__":
    main()
