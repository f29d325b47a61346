"""Generation on a GPU against transformers on torch: one run, the engines taking turns, medians of several.

A random Llama of the shapes of 3.1 8B in bfloat16, whose weights are made on the device. Decoding is timed as in
`cpu_generation.py`. A decoding step reads every weight once: the card's bandwidth, measured by copying, bounds it.

Give --peer-python an interpreter with torch, built for the card, and transformers; without, only ours is measured.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gpu_worker import LLAMA_8B
from workers import Worker

ASKED = {"decode, 1 stream": 1.5, "decode, 16 streams": 1.5, "prefill, 512 tokens": 1.0}
COPY = """
import time, jax, jax.numpy as jnp
x = jnp.ones(2**29, jnp.float32)
add = jax.jit(lambda x: x + 1)
add(x).block_until_ready()
times = []
for _ in range(20):
    start = time.perf_counter(); add(x).block_until_ready(); times.append(time.perf_counter() - start)
print(jax.devices()[0].device_kind); print(2 * x.nbytes / min(times))
"""


def weight_bytes(layers: int) -> int:
    """What a step reads of the weights; the embedding is a row."""
    c = LLAMA_8B
    heads = 2 * (c["num_attention_heads"] + c["num_key_value_heads"]) * c["head_dim"]
    layer = c["hidden_size"] * (heads + 3 * c["intermediate_size"])
    return 2 * (layers * layer + c["vocab_size"] * c["hidden_size"])


def main() -> None:
    """Prints a table of medians and, last, the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"], help="fewer to see that it works")
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--compiled", action="store_true", help="the peer also with a static cache and compiled steps")
    args = parser.parse_args()
    card, bandwidth = subprocess.run(
        [sys.executable, "-c", COPY], check=True, capture_output=True, text=True
    ).stdout.splitlines()[-2:]
    names = ["tenfold"]
    if args.peer_python:
        names += ["transformers", *(["transformers-compiled"] if args.compiled else [])]
    pythons = {"tenfold": Path(sys.executable)}
    workers = {
        name: Worker(name, script="gpu_worker.py", python=pythons.get(name, args.peer_python), layers=args.layers)
        for name in names
    }
    measures: dict[str, Callable[[Worker], float]] = {
        "decode, 1 stream": lambda w: w.decode_rate(1),
        "decode, 16 streams": lambda w: w.decode_rate(16),
        "prefill, 512 tokens": lambda w: w.prefill_rate(512),
        "prefill, 2,048 tokens": lambda w: w.prefill_rate(2048),
    }
    rates: dict[tuple[str, str], list[float]] = {}
    for repeat in range(args.repeats + 1):
        for measure, rate in measures.items():
            for name, worker in workers.items():
                value = rate(worker)
                if repeat:  # the first round warms up
                    rates.setdefault((measure, name), []).append(value)
    for worker in workers.values():
        worker.close()
    print(f"{card}, copies at {float(bandwidth) / 1e9:.0f} GB/s")
    print(f"{'tokens/s, median':24s}" + "".join(f"{name:>24s}" for name in workers))
    for measure in measures:
        print(f"{measure:24s}" + "".join(f"{statistics.median(rates[measure, name]):24.1f}" for name in workers))
    single = statistics.median(rates["decode, 1 stream", "tenfold"])
    print(f"decode reaches {single * weight_bytes(args.layers) / float(bandwidth):.0%} of the bandwidth")
    for measure, asked in ASKED.items() if len(names) > 1 else ():
        ours, *theirs = (rates[measure, name] for name in names)
        ratio = statistics.median(a / max(others) for a, *others in zip(ours, *theirs, strict=True))
        print(f"ratio to the better peer, {measure}: {ratio:.2f}x (asked of a CPU: {asked:.1f}x)")


if __name__ == "__main__":
    main()
