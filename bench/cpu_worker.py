"""One engine behind a pipe: reads a JSON line {"prompts": [[ids]], "tokens": n}, answers {"seconds": s}.

Run by `cpu_generation.py` with the Python of the engine: `cpu_worker.py tenfold|transformers CHECKPOINT`.
"""

import json
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], None]


def load_tenfold(path: str) -> Generate:
    """Our engine, without text."""
    import math
    from pathlib import Path

    from tenfold import SamplingParams
    from tenfold.engine.config import EngineConfig
    from tenfold.engine.engine import Engine

    config = EngineConfig(max_model_len=1024, max_num_seqs=16, decode_slowdown=math.inf, cache_memory=2**30)
    engine = Engine.from_pretrained(Path(path), config)

    def generate(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.add(str(i), prompt, params)
        produced = 0
        while engine.has_work:
            produced += sum(len(output.token_ids) for output in engine.step())
        assert produced == tokens * len(prompts)

    return generate


def load_transformers(path: str) -> Generate:
    """The peer: greedy `generate` in float32 with its default attention and a dynamic cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()

    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == len(prompts[0]) + tokens

    return generate


def main() -> None:
    """Serves the pipe until it closes."""
    generate = {"tenfold": load_tenfold, "transformers": load_transformers}[sys.argv[1]](sys.argv[2])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        generate(job["prompts"], job["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
