"""One engine behind a pipe: reads a JSON line {"prompts": [[ids]], "tokens": n}, answers {"seconds": s}.

Run by the benchmarks with the Python of the engine: `cpu_worker.py tenfold|transformers|llama.cpp CHECKPOINT OPTIONS`,
where OPTIONS are JSON: the arguments of the engine's loader below.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], None]
CONTEXT = 4352


def load_tenfold(
    path: str, dtype: str = "float32", quantization: str | None = None, max_model_len: int = 1024
) -> Generate:
    """Our engine, without text."""
    import math
    from pathlib import Path

    from tenfold.engine.config import EngineConfig
    from tenfold.engine.engine import Engine

    config = EngineConfig(
        max_model_len=max_model_len,
        max_num_seqs=16,
        decode_slowdown=math.inf,
        cache_memory=2**30,
        dtype=dtype,
        quantization=quantization,
    )
    return generate_greedily(Engine.from_pretrained(Path(path), config))


def generate_greedily(engine: Any) -> Generate:
    """What answers with our engine."""
    from tenfold import SamplingParams

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

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 2 * CONTEXT, 512, 512, 16
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    params.kv_unified = True  # sequences share the cells of one cache
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
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


def serve(generate: Generate) -> None:
    """Answers the lines of the pipe until it closes."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        generate(job["prompts"], job["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def main() -> None:
    """Loads an engine, and serves the pipe until it closes."""
    loaders = {"tenfold": load_tenfold, "transformers": load_transformers, "llama.cpp": load_llama_cpp}
    serve(loaders[sys.argv[1]](sys.argv[2], **json.loads(sys.argv[3])))


if __name__ == "__main__":
    main()
