"""A checkpoint of a few thousand random weights, for tests that need a real one on disk."""

import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np

from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tenfold.nn.param import Param, map_params
from tenfold.testing.byte_tokenizer import BOS_ID, END_ID, EOS_ID, VOCAB_SIZE, write_byte_tokenizer

_SCALE = 0.15  # large enough that no two logits of a greedy choice are within rounding errors of each other


def write_tiny_checkpoint(
    directory: Path,
    *,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    max_len: int = 512,
    seed: int = 0,
) -> None:
    """Writes a random Llama in Hugging Face's format, in float32, with a byte tokenizer and a chat template.

    The same arguments give the same weights. What it generates means nothing, and is rarely valid UTF-8.

    Args:
        directory: made if it does not exist.
        layers, width, heads, kv_heads: of the decoder; the feed-forward is twice as wide.
        max_len: of the context.
        seed: of the weights.
    """
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "max_position_embeddings": max_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    generation = {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, END_ID]}
    tree = resolve(config).params()
    weights = map_params(partial(_draw, seed=seed), tree)
    checkpoint.export(directory, tree, weights, config=config, dtype=np.float32, generation_config=generation)
    write_byte_tokenizer(directory)


def _draw(p: Param, *, seed: int) -> jax.Array:
    """A weight drawn with numpy: compiling `param.initialize` would take longer than all the rest."""
    if p.init != "normal":
        return jax.device_put(np.full(p.shape, 1 if p.init == "ones" else 0, np.float32))
    random = np.random.default_rng([seed, zlib.crc32(p.sources[0].name.encode())])
    return jax.device_put(random.normal(scale=_SCALE, size=p.shape).astype(np.float32))
