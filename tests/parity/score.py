"""Scores prompts with transformers: run by the interpreter that has torch.

    .venv-peers/bin/python -m tests.parity.score CHECKPOINT...

reads the token ids in each CHECKPOINT/prompt.json, and writes float32 log-probabilities [T, V] of what follows each
token to CHECKPOINT/logprobs.npy.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from tests.parity.reference import load_model, quiet, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    quiet()
    for path in parser.parse_args().checkpoints:
        with torch.inference_mode():
            np.save(path / "logprobs.npy", score(load_model(path), json.loads((path / "prompt.json").read_text())))


if __name__ == "__main__":
    main()
