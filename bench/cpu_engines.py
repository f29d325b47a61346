"""Tenfold's formats on a CPU against llama.cpp and transformers: one run, engines taking turns, medians of several.

A random Llama of 0.5 B weights, and the GGUF files that this script makes of it. llama.cpp is built from source into
.venv-llama by `make bench`.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from bandwidth import read_bandwidth
from checkpoints import HALF_BILLION, half_billion, half_billion_gguf
from workers import Worker

Rates = dict[tuple[str, str], list[float]]


def weight_bytes(bits: float, head_bits: float) -> float:
    """What a decoding step reads; the embedding is one row."""
    c = HALF_BILLION
    heads = 2 * (c["num_attention_heads"] + c["num_key_value_heads"]) * c["head_dim"]
    layer = c["hidden_size"] * (heads + 3 * c["intermediate_size"])
    return (c["num_hidden_layers"] * layer * bits + c["vocab_size"] * c["hidden_size"] * head_bits) / 8


BITS = {"bf16": (16, 16), "8 bits": (8, 8), "4 bits": (4.5, 8)}  # scales of groups of 64 included


def engines(path: Path, files: dict[str, Path]) -> dict[str, tuple[str, Path, dict[str, Any]]]:
    """Every engine and format: name → its worker's arguments."""
    ours = {"dtype": "bfloat16", "max_model_len": 4352}
    return {
        "tenfold bf16": ("tenfold", path, ours),
        "tenfold 8 bits": ("tenfold", path, ours | {"quantization": "int8"}),
        "tenfold 4 bits": ("tenfold", path, ours | {"quantization": "int4"}),
        "llama.cpp bf16": ("llama.cpp", files["BF16"], {}),
        "llama.cpp 8 bits": ("llama.cpp", files["Q8_0"], {}),
        "llama.cpp 4 bits": ("llama.cpp", files["Q4_0"], {}),
        "transformers bf16": ("transformers", path, {"dtype": "bfloat16"}),
        "transformers f32": ("transformers", path, {"dtype": "float32"}),
    }


MEASURES = {
    "decode 1": lambda w: w.decode_rate(1),
    "decode 16": lambda w: w.decode_rate(16),
    "prefill 512": lambda w: w.prefill_rate(512),
    "prefill 4096": lambda w: w.prefill_rate(4096),
}


def measure(repeats: int, measures: list[str], left_out: list[str]) -> tuple[Rates, float]:
    """Rates in tokens per second of every engine, and the bandwidth read in the same minutes."""
    known = engines(half_billion(), half_billion_gguf())
    workers = {name: Worker(e, p, **o) for name, (e, p, o) in known.items() if name not in left_out}
    rates: Rates = {}
    bandwidths: list[float] = []
    for repeat in range(repeats + 1):
        bandwidths.append(read_bandwidth())
        for asked in measures:
            for name, worker in workers.items():
                value = MEASURES[asked](worker)
                print(f"round {repeat} of {repeats}: {name}, {asked}: {value:.1f} tokens/s", flush=True)
                if repeat:  # the first round warms up
                    rates.setdefault((asked, name), []).append(value)
    for worker in workers.values():
        worker.close()
    return rates, statistics.median(bandwidths)


def print_single_streams(rates: Rates, mid: dict[tuple[str, str], float], bandwidth: float) -> None:
    """Shares of the bandwidth, and ratios to the peer of the same bits."""
    for fmt, share in (("bf16", 0.9), ("8 bits", 0.9), ("4 bits", 0.8)):
        reached = mid["decode 1", f"tenfold {fmt}"] * weight_bytes(*BITS[fmt]) / bandwidth
        print(f"decode 1, {fmt}: {reached:.0%} of the bandwidth (asked: {share:.0%})")
    for fmt, ratio in (("bf16", 1.0), ("8 bits", 1.2), ("4 bits", 1.1)):
        ours, theirs = rates["decode 1", f"tenfold {fmt}"], rates["decode 1", f"llama.cpp {fmt}"]
        paired = statistics.median(np.divide(ours, theirs))
        print(f"ratio, decode 1, {fmt}: {paired:.2f}x llama.cpp (asked: {ratio}x)")


def print_ratios(rates: Rates, bandwidth: float) -> None:
    """The claims: shares of the bandwidth, then ratios to the peers."""
    mid = {key: statistics.median(values) for key, values in rates.items()}
    measures = list(dict.fromkeys(asked for asked, _ in mid))
    names = list(dict.fromkeys(name for _, name in mid))
    print(f"{'tokens/s, median':20s}" + "".join(f"{asked:>14s}" for asked in measures))
    for name in names:
        print(f"{name:20s}" + "".join(f"{mid[asked, name]:14.1f}" for asked in measures))
    print(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s")
    if "decode 1" in measures:
        print_single_streams(rates, mid, bandwidth)
    for asked, ratio in (("decode 16", 1.5), ("prefill 512", 1.3), ("prefill 4096", 1.3)):
        if asked not in measures:
            continue
        ours = max(mid[asked, name] for name in names if name.startswith("tenfold"))
        theirs = max(mid[asked, name] for name in names if not name.startswith("tenfold"))
        print(f"ratio, {asked}: {ours / theirs:.2f}x the best peer in any format (asked: {ratio}x)")


def main() -> None:
    """Prints a table of medians and, last, the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measures", nargs="*", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="ENGINE", help='such as "transformers bf16", slow before AVX-512'
    )
    arguments = parser.parse_args()
    print_ratios(*measure(arguments.repeats, arguments.measures, arguments.without))


if __name__ == "__main__":
    main()
