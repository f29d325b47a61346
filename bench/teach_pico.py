"""What fine-tuning teaches pico: where names of the standard library live, which it was never asked before.

Questions about names that are held out of training are asked before, after supervised fine-tuning of all weights, and
after that of adapters, which the engine serves as they were written. Run: python bench/teach_pico.py
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from tenfold import LLM, SamplingParams
from tenfold.nn.lora import LoraConfig
from tenfold.train.adapters import TuningConfig
from tenfold.train.optimizers import OptimizerConfig
from tenfold.train.pico.conversations import conversation
from tenfold.train.pico.corpus import Entry, entries
from tenfold.train.pretrain import Dataset
from tenfold.train.sft import SftConfig, sft
from tenfold.train.trainer import TrainConfig

HELD_OUT = 200
LEARNING_RATES = {"all weights": 5e-4, "adapters": 4e-3}


def question(entry: Entry) -> tuple[str, str]:
    """A question of the new kind, and its answer."""
    module, _, name = entry.name.rpartition(".")
    return f"Where does {entry.name} live?", f"{name} is a {entry.kind} in the module {module}."


def draw(seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Questions to train on, and others about other names."""
    known = [entry for entry in entries() if "." in entry.name]
    drawn = random.Random(seed).sample(known, len(known))
    return [question(e) for e in drawn[HELD_OUT:]], [question(e) for e in drawn[:HELD_OUT]]


def teach(output: Path, questions: list[tuple[str, str]], kind: str, steps: int, seed: int) -> Path:
    """Fine-tunes pico, and returns what `tenfold serve` takes."""
    data = output / "questions.jsonl"
    output.mkdir(parents=True, exist_ok=True)
    data.write_text("".join(json.dumps({"messages": conversation(*asked)}) + "\n" for asked in questions))
    optimizer = OptimizerConfig(
        learning_rate=LEARNING_RATES[kind], weight_decay=0.0, warmup_steps=steps // 10, schedule="linear"
    )
    tuning = TuningConfig(
        lora=LoraConfig(r=16, lora_alpha=32.0) if kind == "adapters" else None,
        max_length=128,
        batch_size=16,
        seed=seed,
        training=TrainConfig(steps=steps, optimizer=optimizer),
    )
    sft(SftConfig(tuning=tuning, datasets=(Dataset(where=str(data)),)), output)
    return output / "model"


def ask(model: Path | None, questions: list[tuple[str, str]]) -> float:
    """The share of questions that are answered word for word, greedily, by the engine that serves."""
    llm = LLM(model, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=128)
    params = SamplingParams(temperature=0.0, max_tokens=64)
    asked = [[{"role": "user", "content": text}] for text, _ in questions]
    outputs = llm.chat(asked, params, use_tqdm=False)
    right = [output.outputs[0].text == answer for output, (_, answer) in zip(outputs, questions, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    """Prints the share of right answers before and after."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="directory that keeps the models")
    parser.add_argument("--steps", type=int, default=120, help="of fine-tuning, of 2,048 tokens each")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of training")
    args = parser.parse_args()
    training, held_out = draw(args.seed)
    print(f"{len(training)} questions to train on, {len(held_out)} about other names: {held_out[0]}")
    print(f"before: {ask(None, held_out):.1%} right", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        output = args.output or Path(temporary)
        for kind in LEARNING_RATES:
            model = teach(output / kind.replace(" ", "-"), training, kind, args.steps, args.seed)
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            print(f"{kind} ({size / 2**20:.1f} MiB): {ask(model, held_out):.1%} right", flush=True)


if __name__ == "__main__":
    main()
