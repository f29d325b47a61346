"""The checkpoints that the benchmarks use: random weights of a stated size, written once into the cache."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tenfold.base import gguf, gguf_names
from tenfold.base.ggml_blocks import GGMLType
from tenfold.base.gguf import Deferred
from tenfold.base.paths import cache_dir
from tenfold.models.family import resolve
from tenfold.nn import checkpoint, safetensors
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
    "max_position_embeddings": 8192,
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


def half_billion_gguf() -> dict[str, Path]:
    """The same model as GGUF files, by their format: "BF16", "Q8_0" and "Q4_0" (all matrices in it)."""
    source = half_billion()
    files = {kind: source.with_name(f"{source.name}-{kind}.gguf") for kind in ("BF16", "Q8_0", "Q4_0")}
    for kind, file in files.items():
        if not file.exists():
            _write_gguf(source, file, GGMLType[kind])
    return files


def _write_gguf(source: Path, file: Path, kind: GGMLType) -> None:
    c, tensors = HALF_BILLION, safetensors.open(source / checkpoint.SINGLE)
    rotated = {"q_proj": c["num_attention_heads"], "k_proj": c["num_key_value_heads"]}

    def deferred(name: str) -> Deferred:
        tensor = tensors[name]
        heads = next((count for part, count in rotated.items() if part in name), None)
        order = None if heads is None else gguf_names.interleaved(len(tensor), heads)
        matrix = tensor.ndim == 2
        return Deferred(
            kind if matrix else GGMLType.F32,
            tensor.shape,
            lambda: np.asarray(tensor if order is None else tensor[order]),
        )

    naming = gguf_names.NAMINGS["llama"]
    metadata = {
        "general.architecture": "llama",
        "general.name": file.stem,
        "llama.vocab_size": c["vocab_size"],
        "llama.context_length": c["max_position_embeddings"] * 2,
        "llama.embedding_length": c["hidden_size"],
        "llama.block_count": c["num_hidden_layers"],
        "llama.feed_forward_length": c["intermediate_size"],
        "llama.rope.dimension_count": c["head_dim"],
        "llama.rope.freq_base": c["rope_theta"],
        "llama.attention.head_count": c["num_attention_heads"],
        "llama.attention.head_count_kv": c["num_key_value_heads"],
        "llama.attention.key_length": c["head_dim"],
        "llama.attention.value_length": c["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "tokenizer.ggml.model": "no_vocab",
    }
    gguf.write(file, metadata, {gguf_names.to_gguf_name(naming, name): deferred(name) for name in tensors})
