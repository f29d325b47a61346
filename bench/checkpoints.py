"""The checkpoints that the benchmarks use: random weights of a stated size, written once into the cache."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tenfold.base.paths import cache_dir
from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tenfold.nn.param import initialize
from tenfold.testing.byte_tokenizer import write_byte_tokenizer

HALF_BILLION: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def half_billion(layers: int = 28) -> Path:
    """A random Llama of 0.5 B weights (28 layers, 1024 wide, 16/8 heads of 128, 3072 ffn, 32,000 vocab), in float32."""
    directory = cache_dir() / "bench" / f"llama-{layers}x1024"
    if not (directory / "config.json").exists():
        config = HALF_BILLION | {"num_hidden_layers": layers}
        tree = resolve(config).params()
        weights = initialize(tree, jax.random.key(0), jnp.float32)
        checkpoint.export(directory, tree, weights, config=config, dtype=jnp.float32)
        write_byte_tokenizer(directory)
    return directory
