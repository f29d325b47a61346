"""The built-in model as a GGUF file, with its tokenizer, in any format that can be written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from tenfold.base import gguf, gguf_names
from tenfold.base.builtin import builtin_model
from tenfold.base.ggml_blocks import GGMLType
from tenfold.base.gguf import Deferred
from tenfold.nn import safetensors
from tests.data.vocabularies import metadata_of

CONFIG: dict[str, Any] = json.loads((builtin_model() / "config.json").read_text())
WEIGHTS = safetensors.open(builtin_model() / "model.safetensors")
HEADS = {"q_proj": CONFIG["num_attention_heads"], "k_proj": CONFIG["num_key_value_heads"]}


def stored(name: str) -> np.ndarray:
    """A tensor of the built-in model in float32, as a file has it: the rows of q and k in another order.

    The order is the specification's: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llama.
    """
    array = WEIGHTS[name].astype(np.float32)
    heads = HEADS.get(name.split(".")[-2])
    return array if heads is None else array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def metadata() -> dict[str, Any]:
    """What a file says of the built-in model."""
    sizes = {
        "context_length": CONFIG["max_position_embeddings"],
        "embedding_length": CONFIG["hidden_size"],
        "block_count": CONFIG["num_hidden_layers"],
        "feed_forward_length": CONFIG["intermediate_size"],
        "attention.head_count": CONFIG["num_attention_heads"],
        "attention.head_count_kv": CONFIG["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": CONFIG["rms_norm_eps"],
        "rope.freq_base": CONFIG["rope_theta"],
    }
    tokenizer = metadata_of(
        tokenizers.Tokenizer.from_file(str(builtin_model() / "tokenizer.json")),
        model="gpt2",
        pre="ufakzeka",
        bos_token_id=0,
        eos_token_id=1,
        eot_token_id=3,
        padding_token_id=2,
        add_bos_token=True,
    )
    template = json.loads((builtin_model() / "tokenizer_config.json").read_text())["chat_template"]
    return {
        "general.architecture": "llama",
        **{f"llama.{key}": value for key, value in sizes.items()},
        **tokenizer,
        "tokenizer.chat_template": template,
    }


def tensors(kind: GGMLType) -> dict[str, Deferred]:
    """Matrices in one format, and vectors in float32."""
    naming = gguf_names.NAMINGS["llama"]

    def deferred(name: str) -> Deferred:
        array = stored(name)
        return Deferred(kind if array.ndim == 2 else GGMLType.F32, array.shape, lambda: array)

    return {gguf_names.to_gguf_name(naming, name): deferred(name) for name in WEIGHTS}


def write_pico(path: Path, kind: GGMLType, **changes: Any) -> None:
    """Writes the model. `changes` replace metadata under "general." or "llama."."""
    changed = {key.replace("__", ".", 1): value for key, value in changes.items()}
    gguf.write(path, metadata() | changed, tensors(kind))


def write_split(directory: Path, kind: GGMLType) -> list[Path]:
    """Writes the model as two files."""
    whole = tensors(kind)
    names = list(whole)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    paths = [directory / f"pico-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, (path, half) in enumerate(zip(paths, halves, strict=True)):
        split = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(2),
            "split.tensors.count": np.int32(len(whole)),
        }
        gguf.write(path, split | (metadata() if number == 0 else {}), {name: whole[name] for name in half})
    return paths
