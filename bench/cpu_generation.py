"""Generation on a CPU against transformers on torch: one run, the two engines taking turns, medians of several.

A random Llama of 0.5 B weights in float32. Decoding is timed as the difference between a long and a one-token run, so
that neither prefill nor start-up is in it; prompts are new every time, so that no prefix cache helps.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from bandwidth import read_bandwidth
from checkpoints import HALF_BILLION, half_billion

HERE = Path(__file__).parent
PEER_PYTHON = HERE.parent / ".venv-peers" / "bin" / "python"
PROMPT, DECODED = 32, 32


class Worker:
    """An engine in its own process."""

    def __init__(self, python: Path, engine: str, checkpoint: Path) -> None:
        command = [str(python), str(HERE / "cpu_worker.py"), engine, str(checkpoint)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a benchmark's worker died; see its message above")
        return json.loads(line)

    def seconds(self, streams: int, prompt: int, tokens: int, vocabulary: int = 32_000) -> float:
        """Time to answer `streams` new prompts of `prompt` tokens with `tokens` each."""
        prompts = [[random.randrange(10, vocabulary) for _ in range(prompt)] for _ in range(streams)]
        assert self._process.stdin is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._process.stdin, flush=True)
        return self._read()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()

    def decode_rate(self, streams: int) -> float:
        """Tokens per second of all streams together, after the first token."""
        whole = self.seconds(streams, PROMPT, DECODED + 1)
        return streams * DECODED / (whole - self.seconds(streams, PROMPT, 1))

    def prefill_rate(self, tokens: int) -> float:
        """Prompt tokens per second up to the first token."""
        return tokens / self.seconds(1, tokens, 1)


def main() -> None:
    """Prints a table of medians and, last, the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    path = half_billion()
    workers = {
        "tenfold": Worker(Path(sys.executable), "tenfold", path),
        "transformers": Worker(PEER_PYTHON, "transformers", path),
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
