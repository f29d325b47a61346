"""GGUF's names for models and tensors, and Hugging Face's for the same.

A GGUF file describes a model with metadata of its own (`llama.attention.head_count`) and names tensors its own way
(`blk.3.attn_q.weight`). Two kinds of tensors also hold other numbers: where ggml rotates neighbouring dims, the rows of
q and k are interleaved, and Gemma's norms have the one added that transformers adds when it runs. Source:
https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py and the scripts in conversion/.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Int

from tenfold.base.errors import CheckpointError, UnsupportedModelError
from tenfold.base.ggml_blocks import FLOATS
from tenfold.base.gguf import GGUFFile

ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG = "rope_factors_long.weight"
ROPE_SHORT = "rope_factors_short.weight"
COMPUTED = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
"""Tensors that are part of the configuration instead of weights."""

_LLAMA_3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_DEFAULT_THETA = 10_000.0


@dataclass(frozen=True)
class Naming:
    """How files of one architecture name and store tensors.

    Attributes:
        architecture, model_type: in Hugging Face's `config.json`.
        layer: Hugging Face's names within a layer by GGUF's, without ".weight".
        interleaved: the rows of q and k are interleaved.
        norm_offset: what is added to the weights of norms.
        activation: of the feed-forward, which files do not say, by its key in `config.json`.
    """

    architecture: str
    model_type: str
    layer: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0
    activation: tuple[str, str] = ("hidden_act", "silu")


_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OUT = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
_PARTS = _OUT | {
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v")},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up")},
}
_FUSED = _OUT | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_AROUND = _AFTER | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_QK = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GELU = ("hidden_activation", "gelu_pytorch_tanh")

NAMINGS = {
    "llama": Naming("LlamaForCausalLM", "llama", _PARTS | _BEFORE, interleaved=True),
    "qwen2": Naming("Qwen2ForCausalLM", "qwen2", _PARTS | _BEFORE),
    "qwen3": Naming("Qwen3ForCausalLM", "qwen3", _PARTS | _BEFORE | _QK),
    "gemma2": Naming("Gemma2ForCausalLM", "gemma2", _PARTS | _AROUND, norm_offset=1.0, activation=_GELU),
    "gemma3": Naming("Gemma3ForCausalLM", "gemma3_text", _PARTS | _AROUND | _QK, norm_offset=1.0, activation=_GELU),
    "phi3": Naming("Phi3ForCausalLM", "phi3", _FUSED | _BEFORE),
    "smollm3": Naming("SmolLM3ForCausalLM", "smollm3", _PARTS | _BEFORE, interleaved=True),
    "olmo2": Naming("Olmo2ForCausalLM", "olmo2", _PARTS | _AFTER | _QK),
}
"""By `general.architecture`."""


def naming(file: GGUFFile) -> Naming:
    """The naming of a file's architecture.

    Raises:
        CheckpointError: if the file does not say what it is.
        UnsupportedModelError: if the architecture is not known.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{file.path} has no general.architecture: it is not a model")
    if architecture not in NAMINGS:
        raise UnsupportedModelError(
            f"{file.path} has the architecture {architecture!r:.80}, which Tenfold does not read from GGUF; it reads "
            f"{', '.join(NAMINGS)}"
        )
    return NAMINGS[architecture]


# --- tensors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSource:
    """Where a file has one of a checkpoint's tensors, and how it has it.

    Attributes:
        name: in the file.
        heads: if not None, the rows are those of so many heads, interleaved within each.
        offset: what the file's values are larger by.
    """

    name: str
    heads: int | None = None
    offset: float = 0.0

    def rows(self, count: int) -> Int[np.ndarray, " count"] | None:
        """For each of the checkpoint's rows the row of the file, or None where they are the same.

        The order of rows changes nothing within them, so that this also selects rows of blocks, codes and scales.

        Raises:
            CheckpointError: if the rows are not those of whole heads with pairs of dims.
        """
        return None if self.heads is None else deinterleaved(count, self.heads)


def deinterleaved(rows: int, heads: int) -> Int[np.ndarray, " rows"]:
    """For each row of a checkpoint's q or k the row of a GGUF file: each head's even rows, then its odd ones."""
    return _paired(rows, heads).swapaxes(1, 2).reshape(rows)


def interleaved(rows: int, heads: int) -> Int[np.ndarray, " rows"]:
    """The inverse: for each row of a GGUF file's q or k the row of a checkpoint."""
    order = np.empty(rows, np.intp)
    order[deinterleaved(rows, heads)] = np.arange(rows)
    return order


def _paired(rows: int, heads: int) -> np.ndarray:
    if rows % (2 * heads):
        raise CheckpointError(
            f"the GGUF file has q or k with {rows} rows, which are not pairs for each of {heads} heads"
        )
    return np.arange(rows).reshape(heads, rows // heads // 2, 2)


def to_hf_name(naming: Naming, name: str) -> str | None:
    """Hugging Face's name of a file's tensor; None for those that are no weights.

    Raises:
        UnsupportedModelError: for a tensor that the architecture does not have.
    """
    if name in COMPUTED:
        return None
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)", stem)
    if kind in ("weight", "bias"):
        if stem in _TOP:
            return f"{_TOP[stem]}.{kind}"
        if layer is not None and layer[2] in naming.layer:
            return f"model.layers.{layer[1]}.{naming.layer[layer[2]]}.{kind}"
    raise UnsupportedModelError(
        f"the GGUF file has the tensor {name!r}, which Tenfold does not know of {naming.architecture}"
    )


def to_gguf_name(naming: Naming, name: str) -> str:
    """A file's name of a checkpoint's tensor.

    Raises:
        UnsupportedModelError: for a tensor that the architecture does not have.
    """
    stem, _, kind = name.rpartition(".")
    for short, long in _TOP.items():
        if stem == long:
            return f"{short}.{kind}"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    for short, long in naming.layer.items():
        if layer is not None and layer[2] == long:
            return f"blk.{layer[1]}.{short}.{kind}"
    raise UnsupportedModelError(f"GGUF has no name for the tensor {name!r} of {naming.architecture}")


def map_tensors(file: GGUFFile) -> dict[str, TensorSource]:
    """Where a file has the weights of a checkpoint, by Hugging Face's names.

    Raises:
        CheckpointError: if the file's metadata lack what this needs.
        UnsupportedModelError: for an unknown architecture or tensor; names it.
    """
    known, keys = naming(file), _Keys(file)
    heads = {"attn_q": keys.count("attention.head_count"), "attn_k": _kv_heads(keys)}
    found: dict[str, TensorSource] = {}
    for name in file:
        hf_name = to_hf_name(known, name)
        if hf_name is not None:
            part = name.split(".")[-2]
            offset = known.norm_offset if part.endswith("norm") else 0.0
            found[hf_name] = TensorSource(name, heads.get(part) if known.interleaved else None, offset)
    return found


# --- configuration --------------------------------------------------------------------------------------------------


def read_config(file: GGUFFile) -> dict[str, Any]:
    """What `config.json` would say of the model in a file.

    Raises:
        CheckpointError: if metadata that this needs are missing or cannot be.
        UnsupportedModelError: for an unknown architecture, and for metadata of the architecture that are not known or
            have values that are not implemented; names key and value.
    """
    known, keys = naming(file), _Keys(file)
    config: dict[str, Any] = {"architectures": [known.architecture], "model_type": known.model_type} | _sizes(
        file, keys
    )
    config |= dict([known.activation]) | {"tie_word_embeddings": "output.weight" not in file} | _read_dtype(file)
    config |= {
        "attention_bias": "blk.0.attn_q.bias" in file or "blk.0.attn_qkv.bias" in file,
        "mlp_bias": "blk.0.ffn_up.bias" in file,
    }
    config |= _read_rope(file, keys, config["head_dim"], config["max_position_embeddings"])
    config |= _READERS.get(known.model_type, lambda keys, config: {})(keys, config)
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    keys.refuse_rest()
    return config


class _Keys:
    """Reads a file's metadata under its architecture's name, and remembers what was asked for."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._prefix = f"{file.metadata['general.architecture']}."
        self._asked: set[str] = set()

    def values(self, key: str) -> Any:
        """The value of a key or None. An array that has one value for all layers is that value."""
        self._asked.add(key)
        value = self._file.metadata.get(self._prefix + key)
        if not isinstance(value, np.ndarray):
            return value
        array = cast("np.ndarray", value)
        return array[0].item() if array.size and (array == array[0]).all() else array

    def get(self, key: str) -> Any:
        """The value of a key that all layers share, or None."""
        value = self.values(key)
        if isinstance(value, np.ndarray | list):
            raise self.unsupported(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. A float32 is the shortest decimal that means it."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e38:
            raise self.damaged(key, value, "a number")
        short = float(str(np.float32(value)))
        return short if np.float32(value) == value else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise self.damaged(key, value, "a positive integer")
        return value

    def window(self) -> int | None:
        """The sliding window, if there is one: 0 stands for none."""
        return self.count("attention.sliding_window") if self.get("attention.sliding_window") not in (None, 0) else None

    def damaged(self, key: str, value: Any, wanted: str) -> CheckpointError:
        """The error for a value that cannot be."""
        found = "no value" if value is None else f"{value!r:.80}"
        return CheckpointError(f"{self._file.path} has {found} as {self._prefix}{key} instead of {wanted}")

    def unsupported(self, key: str, value: Any) -> UnsupportedModelError:
        """The error for a value that is not implemented."""
        return UnsupportedModelError(
            f"{self._file.path} has {value!r:.80} as {self._prefix}{key}, which is not implemented"
        )

    def refuse_rest(self) -> None:
        """Raises the error for a key that nobody asked for, unless its value changes nothing."""
        for full, value in self._file.metadata.items():
            key = full.removeprefix(self._prefix)
            neutral = not isinstance(value, np.ndarray | list) and value in _NEUTRAL.get(key, ())
            if full.startswith(self._prefix) and key not in self._asked and not neutral:
                raise self.unsupported(key, value)


_NEUTRAL = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("reference", "Meta AI original pth"),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.sliding_window": (0,),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.yarn_ext_factor": (1.0,),
}
"""Values that ask for nothing."""


def _sizes(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    embedding = file.infos.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} has no matrix token_embd.weight: it is not a whole language model")
    layers, heads, width = (keys.count(key) for key in ("block_count", "attention.head_count", "embedding_length"))
    if layers > len(file):
        raise keys.damaged("block_count", layers, f"at most as many as there are tensors, {len(file)}")
    if width < heads:
        raise keys.damaged("embedding_length", width, f"at least one for each of {heads} heads")
    head_dim = keys.count("attention.key_length", width // heads)
    if keys.count("attention.value_length", head_dim) != head_dim:
        raise keys.unsupported("attention.value_length", keys.get("attention.value_length"))
    keys.get("vocab_size")  # the embedding says it, and some files leave it out
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": width,
        "intermediate_size": keys.count("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(keys),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
    }


def _kv_heads(keys: _Keys) -> int:
    """As many as there are query heads, where the file does not say."""
    return keys.count("attention.head_count_kv", keys.count("attention.head_count"))


def _read_dtype(file: GGUFFile) -> dict[str, str]:
    """The dtype of the weights, if they all have the same one, which is not quantised."""
    types = {info.type for info in file.infos.values() if len(info.shape) > 1}
    dtypes = [FLOATS[kind].name for kind in types if kind in FLOATS]
    return {"dtype": dtypes[0]} if len(types) == len(dtypes) == 1 else {}


# --- rotary embeddings ----------------------------------------------------------------------------------------------


def _read_rope(file: GGUFFile, keys: _Keys, head_dim: int, max_len: int) -> dict[str, Any]:
    """The rotation, of the layers without a window where layers differ."""
    theta, dims = keys.number("rope.freq_base", _DEFAULT_THETA), keys.count("rope.dimension_count", head_dim)
    if theta <= 1:
        raise keys.damaged("rope.freq_base", theta, "a number above 1")
    if dims > head_dim or (dims < head_dim and naming(file).interleaved):
        raise keys.unsupported("rope.dimension_count", dims)
    original = keys.count("rope.scaling.original_context_length", max_len)
    common = {"rope_theta": theta, "partial_rotary_factor": dims / head_dim}
    kind = keys.get("rope.scaling.type")
    if ROPE_LONG in file and ROPE_SHORT in file and kind in (None, "none", "longrope"):
        common |= {"rope_type": "longrope"} | _attention_factor(keys, "rope.scaling.attn_factor")
        common |= {
            "long_factor": file.dequantize(ROPE_LONG).tolist(),
            "short_factor": file.dequantize(ROPE_SHORT).tolist(),
        }
        return {"rope_parameters": common, "original_max_position_embeddings": original}
    if kind in (None, "none"):
        scaling = _read_frequencies(file, theta, dims) if ROPE_FREQS in file else _read_old_scaling(keys)
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": keys.number("rope.scaling.factor")}
    elif kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": keys.number("rope.scaling.factor")}
        scaling |= {"original_max_position_embeddings": original}
        for name in ("beta_fast", "beta_slow"):
            if keys.get(f"rope.scaling.yarn_{name}") is not None:
                scaling[name] = keys.number(f"rope.scaling.yarn_{name}")
        scaling |= _attention_factor(keys, "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")
    else:
        raise keys.unsupported("rope.scaling.type", kind)
    return {"rope_parameters": {"rope_type": "default"} | common | scaling}


def _sliding_rope(keys: _Keys, config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """The rotations of both kinds of layers, that of those with a window unscaled."""
    sliding = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", theta)}
    return {"rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": sliding}}


def _attention_factor(keys: _Keys, *names: str) -> dict[str, float]:
    """What cosines and sines are multiplied by, where a file says so. Converters store Hugging Face's number."""
    given = [keys.number(name) for name in names if keys.get(name) is not None]
    return {"attention_factor": given[0]} if given else {}


def _read_old_scaling(keys: _Keys) -> dict[str, Any]:
    """Linear scaling under the key that it had first."""
    if keys.get("rope.scale_linear") is None or keys.number("rope.scale_linear") == 1:
        return {}
    return {"rope_type": "linear", "factor": keys.number("rope.scale_linear")}


def _read_frequencies(file: GGUFFile, theta: float, dims: int) -> dict[str, Any]:
    """Llama 3's scaling, which files have as the divisor of each frequency. Its parameters but one never change."""
    divisors = file.dequantize(ROPE_FREQS).reshape(-1)
    factor = float(divisors.max(initial=1.0))
    frequencies = theta ** (-np.arange(divisors.size) * 2 / dims)
    low, high = _LLAMA_3_ROPE["low_freq_factor"], _LLAMA_3_ROPE["high_freq_factor"]
    turns = _LLAMA_3_ROPE["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if divisors.size != dims // 2 or not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModelError(
            f"{file.path} has the tensor {ROPE_FREQS!r} with other factors than Llama 3's, which is not implemented"
        )
    return {} if factor == 1 else {"rope_type": "llama3", "factor": factor, **_LLAMA_3_ROPE}


# --- families -------------------------------------------------------------------------------------------------------


def _layer_types(keys: _Keys, layers: int, window: int | None, period: int) -> list[str]:
    """The kind of each layer: by an array, or every `period`-th sees everything, or all do."""
    key = "attention.sliding_window_pattern"
    given = keys.values(key)
    pattern = np.asarray(period if given is None else given)
    if pattern.dtype == np.bool_ and pattern.shape in ((), (layers,)):
        slides = np.broadcast_to(pattern, layers).tolist()
    elif pattern.dtype.kind == "i" and pattern.ndim == 0 and pattern > 0:
        slides = [(layer + 1) % int(pattern) != 0 for layer in range(layers)]
    else:
        raise keys.damaged(key, given, f"a period, or a boolean for each of {layers} layers")
    return ["sliding_attention" if window is not None and slide else "full_attention" for slide in slides]


def _read_llama(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral's files are Llama's, with a window where there is one."""
    window = keys.window()
    if window is None:
        return {}
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}


def _read_gemma2(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file leaves out has the same defaults on both sides."""
    layers, window = config["num_hidden_layers"], keys.count("attention.sliding_window", 4096)
    found = {
        key: keys.number(key)
        for key in ("attn_logit_softcapping", "final_logit_softcapping")
        if keys.get(key) is not None
    }
    return found | {
        "sliding_window": window,
        "layer_types": _layer_types(keys, layers, window, 2),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=46),
    }


def _read_gemma3(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    layers, window = config["num_hidden_layers"], keys.window()
    capped = keys.get("final_logit_softcapping") not in (None, 0)
    return _sliding_rope(keys, config, _DEFAULT_THETA) | {
        "final_logit_softcapping": keys.number("final_logit_softcapping") if capped else None,
        "sliding_window": window,
        "layer_types": _layer_types(keys, layers, window, 6),
        "query_pre_attn_scalar": _query_scalar(config, layers_of_27b=62),
    }


def _query_scalar(config: Mapping[str, Any], *, layers_of_27b: int) -> int:
    """What queries are divided by the root of, which files do not say: llama.cpp knows the models by their depth."""
    if config["num_hidden_layers"] == layers_of_27b:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def _read_phi3(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": keys.window()}


def _read_olmo2(keys: _Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """OLMo 3's files are OLMo 2's with a window."""
    window = keys.window()
    if window is None:
        keys.values("attention.sliding_window_pattern")
        return {}
    found = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": window}
    found["layer_types"] = _layer_types(keys, config["num_hidden_layers"], window, 4)
    return found | _sliding_rope(keys, config, config["rope_parameters"]["rope_theta"])


_READERS: dict[str, Callable[[_Keys, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _read_llama,
    "gemma2": _read_gemma2,
    "gemma3_text": _read_gemma3,
    "phi3": _read_phi3,
    "olmo2": _read_olmo2,
}
"""What the families have beyond the common configuration, by model type."""
