"""One engine behind a pipe: reads a JSON line {"prompts": [[ids]], "tokens": n}, answers {"seconds": s}.

Run by the benchmarks with the Python of the engine: `cpu_worker.py tenfold|transformers|llama.cpp CHECKPOINT OPTIONS`,
where OPTIONS are JSON: a dtype, and for tenfold perhaps a quantization.
"""

import json
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], int], None]
CONTEXT = 4352


def load_tenfold(path: str, dtype: str = "float32", quantization: str | None = None) -> Generate:
    """Our engine, without text."""
    import math
    from pathlib import Path

    from tenfold import SamplingParams
    from tenfold.engine.config import EngineConfig
    from tenfold.engine.engine import Engine

    config = EngineConfig(
        max_model_len=CONTEXT if quantization or dtype == "bfloat16" else 1024,
        max_num_seqs=16,
        decode_slowdown=math.inf,
        cache_memory=2**30,
        dtype=dtype,
        quantization=quantization,
    )
    engine = Engine.from_pretrained(Path(path), config)

    def generate(prompts: list[list[int]], tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.add(str(i), prompt, params)
        produced = 0
        while engine.has_work:
            produced += sum(len(output.token_ids) for output in engine.step())
        assert produced == tokens * len(prompts)

    return generate


def load_transformers(path: str, dtype: str = "float32") -> Generate:
    """The peer on torch: greedy `generate` with its default attention and a dynamic cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
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


def load_llama_cpp(path: str) -> Generate:
    """The peer in C++: its own batches of all sequences, greedy."""
    import os

    import llama_cpp
    import numpy as np

    threads = os.cpu_count() or 1
    model = llama_cpp.Llama(
        path, n_ctx=CONTEXT * 2, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads,
        n_seq_max=16, kv_unified=True, verbose=False,
    )  # fmt: skip
    context = model.ctx
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> None:
        """Runs (token, position, sequence, wants logits) in one batch."""
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def generate(prompts: list[list[int]], tokens: int) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        entries = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        last: list[int] = [0] * len(prompts)
        vocabulary = model.n_vocab()

        def take(chunk: list[tuple[int, int, int, bool]]) -> None:
            for i, (_, _, sequence, wanted) in enumerate(chunk):
                if wanted:
                    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), shape=(vocabulary,))
                    last[sequence] = int(logits.argmax())

        for start in range(0, len(entries), 512):
            decode(entries[start : start + 512])
            take(entries[start : start + 512])
        for step in range(tokens - 1):
            chunk = [(last[s], len(prompt) + step, s, True) for s, prompt in enumerate(prompts)]
            decode(chunk)
            take(chunk)

    return generate


def main() -> None:
    """Serves the pipe until it closes."""
    loaders = {"tenfold": load_tenfold, "transformers": load_transformers, "llama.cpp": load_llama_cpp}
    generate = loaders[sys.argv[1]](sys.argv[2], **json.loads(sys.argv[3]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        generate(job["prompts"], job["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
