"""Generation on a CPU against transformers on torch: one run, the two engines taking turns, medians of several.

A random Llama of 0.5 B weights in float32. Decoding is timed as the difference between a long and a one-token run, so
that neither prefill nor start-up is in it; prompts are new every time, so that no prefix cache helps.
"""

import argparse
import statistics

from bandwidth import read_bandwidth
from checkpoints import HALF_BILLION, half_billion
from workers import Worker


def main() -> None:
    """Prints a table of medians and, last, the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    path = half_billion()
    workers = {
        "tenfold": Worker("tenfold", path),
        "transformers": Worker("transformers", path),
    }
    measures = {
        "decode, 1 stream": lambda w: w.decode_rate(1),
        "decode, 16 streams": lambda w: w.decode_rate(16),
        "prefill, 512 tokens": lambda w: w.prefill_rate(512),
    }
    rates: dict[tuple[str, str], list[float]] = {}
    bandwidths: list[float] = []
    for repeat in range(repeats + 1):
        bandwidths.append(read_bandwidth())
        for measure, rate in measures.items():
            for name, worker in workers.items():
                value = rate(worker)
                if repeat:  # the first round warms up
                    rates.setdefault((measure, name), []).append(value)
    for worker in workers.values():
        worker.close()

    c = HALF_BILLION
    heads = 2 * (c["num_attention_heads"] + c["num_key_value_heads"]) * c["head_dim"]
    layer = c["hidden_size"] * (heads + 3 * c["intermediate_size"])
    read = 4 * (c["num_hidden_layers"] * layer + c["vocab_size"] * c["hidden_size"])  # the embedding is one row
    print(f"{'tokens/s, median':24s}" + "".join(f"{name:>16s}" for name in workers))
    for measure in measures:
        print(f"{measure:24s}" + "".join(f"{statistics.median(rates[measure, name]):16.1f}" for name in workers))
    bandwidth = statistics.median(bandwidths)
    single = statistics.median(rates["decode, 1 stream", "tenfold"])
    print(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s; a step reads {read / 1e9:.2f} GB of weights")
    print(f"decode reaches {single * read / bandwidth:.0%} of it (asked: 75 %)")
    for measure, asked in zip(measures, (1.5, 1.5, 1.0), strict=True):
        ours, theirs = (rates[measure, name] for name in workers)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(f"ratio, {measure}: {ratio:.2f}x (asked: {asked:.1f}x)")


if __name__ == "__main__":
    main()
