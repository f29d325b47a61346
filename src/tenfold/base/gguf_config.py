"""What `config.json` would say of the model in a GGUF file.

Sources: gguf-py/gguf/constants.py and the scripts in conversion/ of https://github.com/ggml-org/llama.cpp.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tenfold.base.errors import CheckpointError, UnsupportedModelError
from tenfold.base.ggml_blocks import FLOATS
from tenfold.base.gguf import GGUFFile
from tenfold.base.gguf_keys import Keys
from tenfold.base.gguf_names import ROPE_FREQS, ROPE_LONG, ROPE_SHORT, kv_heads, naming

_LLAMA_3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_DEFAULT_THETA = 10_000.0
_GATING = {1: "softmax", 2: "sigmoid"}  # what experts are scored with, by llama.cpp's numbers
_GROUPS = {160: (8, 3), 256: (8, 4)}
"""Of DeepSeek's many experts, and how many are chosen from, which its older files leave out."""


def read_config(file: GGUFFile) -> dict[str, Any]:
    """What `config.json` would say of the model in a file.

    Raises:
        CheckpointError: if metadata that this needs are missing or cannot be.
        UnsupportedModelError: for an unknown architecture, and for metadata of the architecture that are not known or
            have values that are not implemented; names key and value.
    """
    known, keys = naming(file), Keys(file)
    config: dict[str, Any] = {"architectures": [known.architecture], "model_type": known.model_type} | _sizes(
        file, keys
    )
    config |= dict([known.activation]) | {"tie_word_embeddings": "output.weight" not in file} | _read_dtype(file)
    config |= {
        "attention_bias": any(f"blk.0.attn_{part}.bias" in file for part in ("q", "qkv", "kv_a_mqa")),
        "mlp_bias": "blk.0.ffn_up.bias" in file,
    }
    config |= _read_rope(file, keys, config["head_dim"], config["max_position_embeddings"])
    config |= _READERS.get(known.model_type, lambda keys, config: {})(keys, config)
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    keys.refuse_rest()
    return config


def _sizes(file: GGUFFile, keys: Keys) -> dict[str, Any]:
    embedding = file.infos.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path} has no matrix token_embd.weight: it is not a whole language model")
    layers, heads, width = (keys.count(key) for key in ("block_count", "attention.head_count", "embedding_length"))
    if layers > len(file):
        raise keys.damaged("block_count", layers, f"at most as many as there are tensors, {len(file)}")
    if width < heads:
        raise keys.damaged("embedding_length", width, f"at least one for each of {heads} heads")
    if naming(file).latent:
        head_dim = keys.count("rope.dimension_count")
    else:
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
        "num_key_value_heads": kv_heads(keys),
        "head_dim": head_dim,
        "max_position_embeddings": keys.count("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
    }


def _read_dtype(file: GGUFFile) -> dict[str, str]:
    """The dtype of the weights, if they all have the same one, which is not quantised."""
    types = {info.type for info in file.infos.values() if len(info.shape) > 1}
    dtypes = [FLOATS[kind].name for kind in types if kind in FLOATS]
    return {"dtype": dtypes[0]} if len(types) == len(dtypes) == 1 else {}


# --- rotary embeddings ----------------------------------------------------------------------------------------------


def _read_rope(file: GGUFFile, keys: Keys, head_dim: int, max_len: int) -> dict[str, Any]:
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


def _sliding_rope(keys: Keys, config: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """The rotations of both kinds of layers, that of those with a window unscaled."""
    sliding = {"rope_type": "default", "rope_theta": keys.number("rope.freq_base_swa", theta)}
    return {"rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": sliding}}


def _attention_factor(keys: Keys, *names: str) -> dict[str, float]:
    """What cosines and sines are multiplied by, where a file says so. Converters store Hugging Face's number."""
    given = [keys.number(name) for name in names if keys.get(name) is not None]
    return {"attention_factor": given[0]} if given else {}


def _read_old_scaling(keys: Keys) -> dict[str, Any]:
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


def _layer_types(keys: Keys, layers: int, window: int | None, period: int) -> list[str]:
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


def _read_llama(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral's files are Llama's, with a window where there is one, and Mixtral's are with experts."""
    window = keys.window()
    if keys.get("expert_count") not in (None, 0):
        found = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": window}
        return found | _experts(keys, "num_local_experts")
    if window is None:
        return {}
    return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}


def _experts(keys: Keys, count: str = "num_experts") -> dict[str, Any]:
    return {count: keys.count("expert_count"), "num_experts_per_tok": keys.count("expert_used_count")}


def _read_qwen2_moe(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """All layers are mixtures, here and in the two that follow, and whether weights are renormalised is not said."""
    return _experts(keys) | {
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "shared_expert_intermediate_size": keys.count("expert_shared_feed_forward_length", config["intermediate_size"]),
        "qkv_bias": config["attention_bias"],
        "norm_topk_prob": False,
    }


def _read_qwen3_moe(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    width = keys.count("expert_feed_forward_length")
    return _experts(keys) | {"moe_intermediate_size": width, "norm_topk_prob": True}


def _read_olmoe(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    return _experts(keys) | {"norm_topk_prob": False}


def _read_gpt_oss(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """What files leave out is what the published models have."""
    return _experts(keys, "num_local_experts") | {
        "intermediate_size": keys.count("expert_feed_forward_length", config["intermediate_size"]),
        "sliding_window": keys.window(),
        "layer_types": _layer_types(keys, config["num_hidden_layers"], keys.window(), 2),
        "rope_parameters": config["rope_parameters"] | {"truncate": False},
    }


def _read_deepseek(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """V2, and V3 where experts are scored with a sigmoid.

    Newer files have other sizes of keys and values for the absorbed form of attention, and the model's own as "mla".
    """
    gating, experts = keys.get("expert_gating_func") or 1, keys.count("expert_count")
    if gating not in _GATING:
        raise keys.unsupported("expert_gating_func", gating)
    V3 = _GATING[gating] == "sigmoid"
    absorbed = keys.get("attention.key_length_mla") is not None
    lengths = {name: keys.count(f"attention.{name}_length") for name in ("key", "value")}
    if absorbed:
        lengths = {name: keys.count(f"attention.{name}_length_mla") for name in lengths}
    groups, chosen = _GROUPS.get(experts, (1, 1))
    if lengths["key"] <= config["head_dim"]:
        raise keys.damaged("attention.key_length", lengths["key"], f"more than {config['head_dim']} rotated dims")
    return _experts(keys, "n_routed_experts") | {
        "architectures": ["DeepseekV3ForCausalLM" if V3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if V3 else "deepseek_v2",
        "q_lora_rank": keys.count_or_none("attention.q_lora_rank"),
        "kv_lora_rank": keys.count("attention.kv_lora_rank"),
        "qk_nope_head_dim": lengths["key"] - config["head_dim"],
        "qk_rope_head_dim": config["head_dim"],
        "v_head_dim": lengths["value"],
        "moe_intermediate_size": keys.count("expert_feed_forward_length"),
        "n_shared_experts": keys.count("expert_shared_count"),
        "first_k_dense_replace": keys.count_or_none("leading_dense_block_count") or 0,
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
        "norm_topk_prob": keys.flag("expert_weights_norm"),
        "scoring_func": _GATING[gating],
        "topk_method": "noaux_tc" if V3 else "group_limited_greedy",
        "n_group": keys.count("expert_group_count", groups),
        "topk_group": keys.count("expert_group_used_count", chosen),
        "rope_parameters": config["rope_parameters"] | _yarn_scales(keys),
    }


def _yarn_scales(keys: Keys) -> dict[str, float]:
    """What YaRN multiplies scores by, in Hugging Face's terms; files have a tenth of it."""
    key = "rope.scaling.yarn_log_multiplier"
    if keys.get(key) is None:
        return {}
    scale = float(f"{keys.number(key) * 10:.6g}")
    return {"mscale": scale, "mscale_all_dim": scale}


def _read_gemma2(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
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


def _read_gemma3(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
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


def _read_phi3(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": keys.window()}


def _read_olmo2(keys: Keys, config: Mapping[str, Any]) -> dict[str, Any]:
    """OLMo 3's files are OLMo 2's with a window."""
    window = keys.window()
    if window is None:
        keys.values("attention.sliding_window_pattern")
        return {}
    found = {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "sliding_window": window}
    found["layer_types"] = _layer_types(keys, config["num_hidden_layers"], window, 4)
    return found | _sliding_rope(keys, config, config["rope_parameters"]["rope_theta"])


_READERS: dict[str, Callable[[Keys, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _read_llama,
    "qwen2_moe": _read_qwen2_moe,
    "qwen3_moe": _read_qwen3_moe,
    "olmoe": _read_olmoe,
    "deepseek_v2": _read_deepseek,
    "gpt_oss": _read_gpt_oss,
    "gemma2": _read_gemma2,
    "gemma3_text": _read_gemma3,
    "phi3": _read_phi3,
    "olmo2": _read_olmo2,
}
"""What the families have beyond the common configuration, by model type."""
