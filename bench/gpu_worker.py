"""One engine on a GPU behind a pipe, as `cpu_worker.py`: a Llama 3.1 8B in bfloat16 with random weights.

The weights are made on the device: `gpu_worker.py tenfold|transformers|transformers-compiled OPTIONS`.
"""

import json
import sys
from typing import Any

from cpu_worker import Generate, generate_greedily, serve

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONTEXT = 4352


def load_tenfold(layers: int) -> Generate:
    """Our engine, without text."""
    import math

    import jax
    import jax.numpy as jnp

    from tenfold.engine.config import EngineConfig
    from tenfold.engine.engine import Engine
    from tenfold.engine.memory import free_memory, plan_cache
    from tenfold.models.family import resolve
    from tenfold.nn.param import initialize

    config = EngineConfig(
        max_model_len=CONTEXT,
        max_num_seqs=16,
        max_num_batched_tokens=2048,
        decode_slowdown=math.inf,
        cache_memory=12 * 2**30,
        dtype="bfloat16",
    )
    model = resolve(LLAMA_8B | {"num_hidden_layers": layers}).with_max_len(CONTEXT)
    device = jax.devices()[0]
    plan = plan_cache(model, config, jnp.dtype(jnp.bfloat16), free_memory(device), device.platform)
    params = initialize(model.params(), jax.random.key(0), jnp.bfloat16)
    return generate_greedily(Engine(model, params, config, plan))


def load_transformers(layers: int, *, compiled: bool) -> Generate:
    """The peer on torch: greedy `generate`, with a cache that grows, or a static one and compiled steps."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**LLAMA_8B | {"num_hidden_layers": layers}), dtype=torch.bfloat16
        )
    model.eval()

    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts, device="cuda")
        more = {"cache_implementation": "static"} if compiled else {}
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0, **more,
            )  # fmt: skip
        assert out.shape[1] == len(prompts[0]) + tokens
        torch.cuda.synchronize()

    return generate


def main() -> None:
    """Serves the pipe until it closes."""
    engine, layers = sys.argv[1], json.loads(sys.argv[2])["layers"]
    if engine == "tenfold":
        serve(load_tenfold(layers))
    else:
        serve(load_transformers(layers, compiled=engine == "transformers-compiled"))


if __name__ == "__main__":
    main()
