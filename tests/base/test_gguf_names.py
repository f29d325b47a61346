"""Tiny models written as llama.cpp's scripts would write them, with the package `gguf`, and read back."""

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.base import gguf, gguf_names
from tenfold.base.errors import CheckpointError, TenfoldError, UnsupportedModelError
from tenfold.base.gguf_config import read_config
from tenfold.base.gguf_names import NAMINGS, deinterleaved, interleaved, map_tensors
from tenfold.models.family import Model, resolve
from tenfold.nn.param import leaves
from tests.parity.cases import CASES, make_weight

CONFIGS = {case.name: case.config for case in CASES}
ARCHITECTURES = {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3_text": "gemma3",
    "olmo3": "olmo2",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
HALVED = ("deepseek_v3",)  # cases whose files have the two halves of kv_b apart, as newer ones do

# A case, and what of it GGUF cannot say: its files leave activations out, and what Gemma's queries are divided by.
EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-llama3-rope-tied": {
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-linear-rope-v4-mha": {},
    "llama-yarn-mqa": {},
    "llama-biases": {"hidden_act": "silu"},
    "mistral": {},
    "qwen2-v4": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma2-uncapped-v4": {
        "attention_bias": False,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3-v4": {"query_pre_attn_scalar": 16},
    "gemma3-layer-types": {"query_pre_attn_scalar": 12},
    "gemma3-default-pattern": {},
    "phi3-partial": {},
    "phi3-longrope-short": {},
    "phi3-longrope-long-v4": {},
    "smollm3": {},
    "olmo2": {},
    "olmo2-mha-biases-v4": {},
    "olmo3": {},
    "olmo3-v4": {},
    "mixtral": {},
    "mixtral-sliding-v4": {},
    "qwen2_moe-v4": {"mlp_only_layers": []},
    "qwen2_moe-sliding": {"use_sliding_window": False, "norm_topk_prob": False},
    "qwen3_moe": {"mlp_only_layers": []},
    "qwen3_moe-sparse-step-v4": {"use_sliding_window": False, "norm_topk_prob": True, "decoder_sparse_step": 1},
    "olmoe": {},
    "gpt_oss": {"swiglu_limit": 7.0},
    "deepseek_v2": {},
    "deepseek_v2-yarn-v4": {},
    "deepseek_v3": {},
    "deepseek_v3-halves-v4": {"rope_interleave": True},
}


def config_of(name: str) -> dict[str, Any]:
    return CONFIGS[name] | EXPRESSIBLE[name]


def hf_tensors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A checkpoint's tensors by name, in the shapes that a Hugging Face checkpoint has."""
    shapes: dict[str, tuple[int, ...]] = {}
    for _, param in leaves(resolve(config).params()):
        for source in param.sources:
            shape = param.checkpoint_shape(source)
            if source.rows is not None:
                shape = (max(source.rows[1], shapes.get(source.name, (0,))[0]), *shape[1:])
            shapes[source.name] = shape
    return {name: make_weight(name, shape, config, 0) for name, shape in shapes.items()}


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """The specification's: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#llama."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def converted(config: Mapping[str, Any], architecture: str) -> Iterator[tuple[str, str, np.ndarray]]:
    """The tensors of a file, each with Hugging Face's name for it, where "{}" is any expert. Names come from the
    library."""
    kind = next(kind for kind, name in library.MODEL_ARCH_NAMES.items() if name == architecture)
    names = library.get_tensor_name_map(kind, config["num_hidden_layers"])
    tensors: dict[str, list[np.ndarray]] = {}
    for name, array in hf_tensors(config).items():
        tensors.setdefault(re.sub(r"experts\.\d+\.", "experts.{}.", name), []).append(array)
    for hf_name, arrays in tensors.items():
        name = re.sub(r"_bias$", ".bias", hf_name.replace("{}.", "").replace("experts.gate_up", "experts.gate"))
        name += "" if name.endswith(("weight", "bias")) else ".weight"
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        array = np.stack(arrays) if "{}" in hf_name else arrays[0]
        if architecture in ("llama", "smollm3") and ".q_proj." in name:
            array = permute(array, config["num_attention_heads"])
        if architecture in ("llama", "smollm3") and ".k_proj." in name:
            array = permute(array, config["num_key_value_heads"])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if name.endswith("shared_expert_gate.weight") and "head_dim" in config:
            array = array[0]  # as scripts do that leave out dims of 1
        yield found, hf_name, array


def split(config: Mapping[str, Any], name: str, array: np.ndarray, halved: bool) -> Iterator[tuple[str, np.ndarray]]:
    """What the scripts take apart and turn: of kv_b each head's keys and values, and gpt-oss's experts."""
    if halved and ".attn_kv_b." in name:
        K, V, R = (config[key] for key in ("qk_nope_head_dim", "v_head_dim", "kv_lora_rank"))
        k, v = np.split(array.reshape(-1, K + V, R), [K], axis=1)
        yield name.replace("kv_b", "k_b"), np.ascontiguousarray(k.transpose(0, 2, 1))
        yield name.replace("kv_b", "v_b"), np.ascontiguousarray(v)
    elif config["model_type"] == "gpt_oss" and "_exps." in name:
        array = array.swapaxes(1, 2) if name.endswith("weight") else array
        if "ffn_gate" in name:
            yield name, np.ascontiguousarray(array[:, ::2])
            yield name.replace("gate", "up"), np.ascontiguousarray(array[:, 1::2])
        else:
            yield name, np.ascontiguousarray(array)
    else:
        yield name, array


def rope_of(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of full and of sliding layers, old spelling or new."""
    given = config.get("rope_parameters")
    if given is None:
        given = {**(config.get("rope_scaling") or {})}
        if "rope_theta" in config:
            given["rope_theta"] = config["rope_theta"]
        if "partial_rotary_factor" in config:
            given["partial_rotary_factor"] = config["partial_rotary_factor"]
    sliding = {"rope_theta": config["rope_local_base_freq"]} if "rope_local_base_freq" in config else {}
    return given.get("full_attention", given), given.get("sliding_attention", sliding)


def write_model(
    path: Path,
    config: Mapping[str, Any],
    *,
    halved: bool = False,
    blocks: library.GGMLQuantizationType = library.GGMLQuantizationType.F32,
) -> None:
    """A file with the metadata that the scripts write for such a model.

    `halved`: kv_b is in halves; `blocks`: of matrices whose rows consist of them.
    """
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = library.GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1 if halved else config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(0)
    writer.add_bos_token_id(5)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") and architecture != "deepseek2":
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(head_dim)
    add_windows(writer, architecture, config)
    add_experts(writer, config)
    if architecture == "deepseek2":
        add_latents(writer, config, halved)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(key):
            getattr(writer, f"add_{key}")(config[key])
    add_rope(writer, architecture, config, head_dim)
    for name, _, array in converted(config, architecture):
        for part, values in split(config, name, array, halved):
            kind = blocks if values.ndim > 1 and values.shape[-1] % 32 == 0 else library.GGMLQuantizationType.F32
            writer.add_tensor(part, library.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_windows(writer: library.GGUFWriter, architecture: str, config: Mapping[str, Any]) -> None:
    if architecture == "phi3":
        writer.add_sliding_window(config.get("sliding_window") or 0)
    elif config.get("sliding_window") and not architecture.startswith("qwen"):
        writer.add_sliding_window(config["sliding_window"])
        if "sliding_window_pattern" in config:
            writer.add_sliding_window_pattern(config["sliding_window_pattern"])
        elif "layer_types" in config and architecture != "gemma2":
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def add_experts(writer: library.GGUFWriter, config: Mapping[str, Any]) -> None:
    count = next((config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in config), 0)
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "gpt_oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in config:
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def add_latents(writer: library.GGUFWriter, config: Mapping[str, Any], halved: bool) -> None:
    third = config["model_type"] == "deepseek_v3"
    key, value = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["v_head_dim"]
    if halved:
        writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(key)
        writer.add_value_length_mla(value)
    else:
        writer.add_key_length(key)
        writer.add_value_length(value)
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config.get("routed_scaling_factor", 2.5 if third else 1.0))
    writer.add_expert_weights_norm(config.get("norm_topk_prob", False))
    writer.add_expert_gating_func(
        library.ExpertGatingFuncType.SIGMOID if third else library.ExpertGatingFuncType.SOFTMAX
    )
    if "n_group" in config:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    rope, _ = rope_of(config)
    if "mscale_all_dim" in rope:
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])


def add_rope(writer: library.GGUFWriter, architecture: str, config: Mapping[str, Any], head_dim: int) -> None:
    rope, sliding = rope_of(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", 1e6 if architecture == "gemma3" else 1e4)
    if architecture != "gemma2" or theta != 1e4:  # the script for Gemma 2 leaves it out
        writer.add_rope_freq_base(theta)
    if "rope_theta" in sliding:
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(library.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (("attention_factor", "attn_factor"), ("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
            if key in rope:
                getattr(writer, f"add_rope_scaling_yarn_{add}")(rope[key])
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama_3_divisors(rope, head_dim))
    if architecture == "phi3":
        original = config.get("original_max_position_embeddings", 4096)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
        if kind == "longrope":
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(scale) / np.log(original))))
            for name in ("long", "short"):
                writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))


def llama_3_divisors(rope: Mapping[str, Any], dims: int) -> np.ndarray:
    """One frequency at a time, as the release of Llama 3.1 has it."""
    divisors = []
    original = rope["original_max_position_embeddings"]
    for pair in range(dims // 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * pair / dims)
        if wavelength < original / rope["high_freq_factor"]:
            divisors.append(1.0)
        elif wavelength > original / rope["low_freq_factor"]:
            divisors.append(rope["factor"])
        else:
            smooth = (original / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def rounded(model: Model) -> Any:
    """A configuration with the numbers that files have in float32 rounded to it."""

    def round_floats(value: Any) -> Any:
        if isinstance(value, float):
            return float(np.float32(value))
        if isinstance(value, tuple):
            return tuple(round_floats(item) for item in value)
        if hasattr(value, "__dataclass_fields__"):
            return {name: round_floats(getattr(value, name)) for name in value.__dataclass_fields__}
        return value

    return model.architecture, round_floats(model.config)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_the_model_comes_back(tmp_path: Path, name: str) -> None:
    """The same configuration and the same weights as the checkpoint that the file was made from."""
    config = config_of(name)
    write_model(tmp_path / "a.gguf", config, halved=name in HALVED)
    file = gguf.open(tmp_path / "a.gguf")
    found = read_config(file)
    assert rounded(resolve(found)) == rounded(resolve(config))
    known = gguf_names.naming(file)
    assert found["architectures"][0] in (known.architecture, *known.others)
    assert found["bos_token_id"] == 5
    assert found["eos_token_id"] is None
    assert found["dtype"] == "float32"
    sources = map_tensors(file)
    weights = hf_tensors(config)
    assert set(sources) == set(weights)
    for hf_name, source in sources.items():
        array = file.dequantize(source.name)
        array = array if source.expert is None else array[source.expert]
        if source.values is not None:
            array = np.concatenate([array.transpose(0, 2, 1), file.dequantize(source.values)], axis=1)
            array = array.reshape(-1, array.shape[-1])
        if source.ups is not None:
            array = np.stack([array, file.dequantize(source.ups)], axis=2).reshape(len(array), -1, *array.shape[2:])
        array = array.swapaxes(1, 2) if source.turned else array
        rows = source.rows(len(array))
        array = array if rows is None else array[rows]
        array = array.reshape(weights[hf_name].shape)
        np.testing.assert_allclose(array - np.float32(source.offset), weights[hf_name], atol=2e-7 * source.offset)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_names_go_both_ways(name: str) -> None:
    config = config_of(name)
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    naming = NAMINGS[architecture]
    for theirs, hf_name, _ in converted(config, architecture):
        assert gguf_names.to_gguf_name(naming, hf_name.format(11)) == theirs
        assert gguf_names.to_hf_name(naming, theirs) == hf_name


@given(heads=st.integers(1, 6), pairs=st.integers(1, 5))
def test_interleaving_is_the_specifications(heads: int, pairs: int) -> None:
    weights = np.arange(heads * pairs * 2 * 3).reshape(-1, 3)
    stored = permute(weights, heads)
    np.testing.assert_array_equal(stored[deinterleaved(len(weights), heads)], weights)
    np.testing.assert_array_equal(weights[interleaved(len(weights), heads)], stored)


def test_rows_that_are_no_heads_are_refused() -> None:
    with pytest.raises(CheckpointError, match="q or k with 9 rows, which are not pairs for each of 3 heads"):
        deinterleaved(9, 3)


# --- sizes of published models, by hand -----------------------------------------------------------------------------


def model_file(
    path: Path, metadata: Mapping[str, Any], *, vocab: int = 64, tensors: Mapping[str, np.ndarray] | None = None
) -> gguf.GGUFFile:
    own = {"token_embd.weight": np.zeros((vocab, 32), np.float16)} | dict(tensors or {})
    layers = {f"blk.{i}.attn_norm.weight": np.ones(32, np.float32) for i in range(80)}
    gguf.write(path, metadata, own | layers)
    return gguf.open(path)


SIZES = {
    "context_length": 8192,
    "embedding_length": 4608,
    "block_count": 46,
    "feed_forward_length": 36864,
    "attention.head_count": 32,
    "attention.head_count_kv": 16,
    "attention.key_length": 128,
    "attention.value_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def metadata_of(architecture: str, **keys: Any) -> dict[str, Any]:
    sizes = SIZES | {key.replace("__", "."): value for key, value in keys.items()}
    named = {f"{architecture}.{key}": value for key, value in sizes.items() if value is not None}
    return {"general.architecture": architecture} | named


def test_gemma_27b_divides_by_another_root(tmp_path: Path) -> None:
    """By 144 and 168, as their config.json have it, and the smaller ones by the size of a head."""
    gemma_2 = metadata_of("gemma2", attention__sliding_window=4096)
    assert read_config(model_file(tmp_path / "a.gguf", gemma_2))["query_pre_attn_scalar"] == 144
    gemma_3 = metadata_of("gemma3", block_count=62, embedding_length=5376, attention__sliding_window=1024)
    found = read_config(model_file(tmp_path / "b.gguf", gemma_3))
    assert found["query_pre_attn_scalar"] == 168
    assert found["layer_types"][:6] == ["sliding_attention"] * 5 + ["full_attention"]
    assert found["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 10_000.0}
    small = metadata_of("gemma3", block_count=26, attention__sliding_window=512)
    assert read_config(model_file(tmp_path / "c.gguf", small))["query_pre_attn_scalar"] == 128


def test_gemma_3_without_a_window_sees_everything(tmp_path: Path) -> None:
    found = read_config(model_file(tmp_path / "a.gguf", metadata_of("gemma3", block_count=4)))
    assert found["layer_types"] == ["full_attention"] * 4
    assert found["sliding_window"] is None


def test_older_files_of_deepseek_leave_its_groups_out(tmp_path: Path) -> None:
    """DeepSeek V3, as its config.json has it."""
    sizes = {
        "block_count": 61,
        "embedding_length": 7168,
        "attention__head_count": 128,
        "attention__head_count_kv": 128,
        "attention__key_length": 192,
        "attention__q_lora_rank": 1536,
        "attention__kv_lora_rank": 512,
        "rope__dimension_count": 64,
        "expert_count": 256,
        "expert_used_count": 8,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 2048,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "leading_dense_block_count": 3,
    }
    found = read_config(model_file(tmp_path / "a.gguf", metadata_of("deepseek2", **sizes)))
    assert (found["architectures"], found["n_group"], found["topk_group"]) == (["DeepseekV3ForCausalLM"], 8, 4)
    assert [found[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v")] == [128, 64, 128]
    router: Any = resolve(found).config.router
    assert (router.top_k, router.groups, router.top_groups, router.scale) == (8, 8, 4, 2.5)
    with pytest.raises(UnsupportedModelError, match="has 3 as deepseek2.expert_gating_func"):
        read_config(model_file(tmp_path / "b.gguf", metadata_of("deepseek2", **sizes | {"expert_gating_func": 3})))


def test_what_files_leave_out(tmp_path: Path) -> None:
    """As the oldest: heads are wide as they must be, every head has its own keys, nothing is scaled."""
    bare = metadata_of("llama", attention__key_length=None, attention__value_length=None, attention__head_count_kv=None)
    found = read_config(model_file(tmp_path / "a.gguf", bare))
    assert (found["head_dim"], found["num_key_value_heads"]) == (144, 32)
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
    assert found["tie_word_embeddings"] is True
    assert found["dtype"] == "float16"
    assert found["vocab_size"] == 64
    scaled = bare | {"llama.rope.scale_linear": 4.0}
    rope = read_config(model_file(tmp_path / "b.gguf", scaled))["rope_parameters"]
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


def test_numbers_are_the_decimals_that_were_meant(tmp_path: Path) -> None:
    metadata = metadata_of("llama", attention__layer_norm_rms_epsilon=np.float32(1e-5), rope__freq_base=np.float32(1e6))
    found = read_config(model_file(tmp_path / "a.gguf", metadata))
    assert found["rms_norm_eps"] == 1e-5
    assert found["rope_parameters"]["rope_theta"] == 1e6


def test_one_value_for_every_layer_is_one_value(tmp_path: Path) -> None:
    metadata = metadata_of("llama", attention__head_count=np.full(46, 32, np.int32))
    assert read_config(model_file(tmp_path / "a.gguf", metadata))["num_attention_heads"] == 32
    metadata["llama.feed_forward_length"] = np.arange(1, 47, dtype=np.int32)
    with pytest.raises(UnsupportedModelError, match=r"as llama.feed_forward_length, which is not implemented"):
        read_config(model_file(tmp_path / "b.gguf", metadata))


def test_values_that_change_nothing_are_let_through(tmp_path: Path) -> None:
    neutral = {
        "expert_count": 0,
        "attention__causal": True,
        "attention__sliding_window": 0,
        "tensor_data_layout": "Meta AI original pth",
        "rope__scaling__type": "none",
        "rope__scaling__finetuned": False,
    }
    for architecture in ("llama", "qwen3"):
        found = read_config(model_file(tmp_path / f"{architecture}.gguf", metadata_of(architecture, **neutral)))
        assert found["model_type"] == architecture


def test_quantised_files_have_no_dtype(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    tensors = {"token_embd.weight": gguf.Deferred(gguf.GGMLType.Q8_0, (64, 32), lambda: np.ones((64, 32)))}
    gguf.write(path, metadata_of("llama", block_count=1), tensors)
    assert "dtype" not in read_config(gguf.open(path))


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        ("mamba", {}, "has the architecture 'mamba', which Tenfold does not read from GGUF; it reads llama, qwen2"),
        ("qwen2", {"expert_count": 8}, "has 8 as qwen2.expert_count, which is not implemented"),
        (
            "llama",
            {"attention__temperature_scale": 0.1},
            "as llama.attention.temperature_scale, which is not implement",
        ),
        ("qwen2", {"attention__sliding_window": 128}, "has 128 as qwen2.attention.sliding_window, which is not"),
        ("qwen3", {"attention__causal": False}, "has False as qwen3.attention.causal, which is not implemented"),
        ("llama", {"rope__scaling__type": "dynamic"}, "has 'dynamic' as llama.rope.scaling.type, which is not"),
        ("llama", {"attention__value_length": 64}, "has 64 as llama.attention.value_length, which is not implemented"),
        ("llama", {"rope__dimension_count": 64}, "has 64 as llama.rope.dimension_count, which is not implemented"),
        ("phi3", {"rope__dimension_count": 256}, "has 256 as phi3.rope.dimension_count, which is not implemented"),
        ("llama", {"rope__scaling__factor": 8.0}, "has 8.0 as llama.rope.scaling.factor, which is not implemented"),
        ("llama", {"attention__sliding_window": np.arange(4)}, "as llama.attention.sliding_window, which is not"),
        ("llama", {"attention__new": np.arange(4)}, "as llama.attention.new, which is not implemented"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, architecture: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        read_config(model_file(tmp_path / "a.gguf", metadata_of(architecture, **keys)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": None}, "has no value as gemma2.block_count instead of a positive integer"),
        ({"block_count": 0}, "has 0 as gemma2.block_count instead of a positive integer"),
        ({"block_count": 2**31}, "has 2147483648 as gemma2.block_count instead of"),
        (
            {"block_count": 2**30},
            "has 1073741824 as gemma2.block_count instead of at most as many as there are tensors",
        ),
        ({"embedding_length": "wide"}, "has 'wide' as gemma2.embedding_length instead of a positive integer"),
        ({"embedding_length": 4608.0}, "has 4608.0 as gemma2.embedding_length instead of a positive integer"),
        ({"attention__head_count": True}, "has True as gemma2.attention.head_count instead of"),
        ({"attention__layer_norm_rms_epsilon": float("nan")}, "has nan as gemma2.attention.layer_norm_rms_epsilon"),
        ({"attention__layer_norm_rms_epsilon": None}, "has no value as gemma2.attention.layer_norm_rms_epsilon"),
        ({"rope__freq_base": 0.0}, "has 0.0 as gemma2.rope.freq_base instead of a number above 1"),
        ({"attention__sliding_window_pattern": 0}, "gemma2.attention.sliding_window_pattern instead of a period"),
        (
            {"attention__sliding_window_pattern": np.array([True, False])},
            "gemma2.attention.sliding_window_pattern instead of a period, or a boolean for each of 46 layers",
        ),
        (
            {"attention__head_count": 5000},
            "has 4608 as gemma2.embedding_length instead of at least one for each of 5000",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(model_file(tmp_path / "a.gguf", metadata_of("gemma2", **keys)))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    gguf.write(tmp_path / "a.gguf", {"general.type": "imatrix"}, {})
    with pytest.raises(CheckpointError, match="a.gguf has no general.architecture: it is not a model"):
        read_config(gguf.open(tmp_path / "a.gguf"))
    gguf.write(tmp_path / "b.gguf", metadata_of("llama"), {})
    with pytest.raises(CheckpointError, match="b.gguf has no matrix token_embd.weight"):
        read_config(gguf.open(tmp_path / "b.gguf"))


@pytest.mark.parametrize(
    "name",
    ["blk.0.ffn_gate_shexp.weight", "blk.00.attn_q.weight", "blk.0.attn_q.scale", "blk.x.attn_q.weight", "weight"],
)
def test_unknown_tensors_are_refused(tmp_path: Path, name: str) -> None:
    file = model_file(tmp_path / "a.gguf", metadata_of("llama"), tensors={name: np.ones(3, np.float32)})
    with pytest.raises(UnsupportedModelError, match=f"has the tensor '{name}', which Tenfold does not know of Llama"):
        map_tensors(file)


def test_names_that_gguf_lacks_are_refused() -> None:
    for name in ("model.layers.0.self_attn.sinks", "model.layers.0.self_attn.qkv_proj.weight", "model.vision.weight"):
        with pytest.raises(
            UnsupportedModelError, match=f"GGUF has no name for the tensor '{name}' of LlamaForCausalLM"
        ):
            gguf_names.to_gguf_name(NAMINGS["llama"], name)


def test_other_frequencies_are_refused(tmp_path: Path) -> None:
    rope = {"rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 4.0}
    divisors = llama_3_divisors(rope | {"original_max_position_embeddings": 8192}, 128)
    metadata = metadata_of("llama", rope__freq_base=500_000.0)
    for wrong in (divisors, np.ones(3, np.float32), np.full(64, np.nan, np.float32)):
        file = model_file(tmp_path / "a.gguf", metadata, tensors={"rope_freqs.weight": wrong})
        with pytest.raises(UnsupportedModelError, match="'rope_freqs.weight' with other factors than Llama 3's"):
            read_config(file)
    file = model_file(tmp_path / "a.gguf", metadata, tensors={"rope_freqs.weight": np.ones(64, np.float32)})
    assert read_config(file)["rope_parameters"]["rope_type"] == "default"


def anything() -> st.SearchStrategy[Any]:
    """Every kind of value that a file's metadata can hold."""
    numbers = st.one_of(st.integers(-2, 70), st.integers(-(2**63), 2**64 - 1), st.floats(), st.floats(width=32))
    words = st.sampled_from(["", "linear", "yarn", "longrope", "none", "reference"])
    arrays = st.sampled_from(
        [np.arange(46), np.ones(46, np.int32), np.zeros(46, np.bool_), np.ones(0), [], ["a"], [[]]]
    )
    return st.one_of(numbers, words, st.booleans(), arrays)


@given(architecture=st.sampled_from(list(NAMINGS)), data=st.data())
@settings(max_examples=400)
def test_no_metadata_do_more_than_raise(files: gguf.GGUFFile, architecture: str, data: st.DataObject) -> None:
    """Whatever they say, nothing is read but a configuration, which the families take or refuse."""
    metadata = metadata_of(architecture, rope__scaling__type="yarn", rope__scaling__factor=2.0, rope__freq_base=1e4)
    others = ["rope.scaling.original_context_length", "rope.dimension_count", "attention.sliding_window", "vocab_size"]
    others += ["attention.sliding_window_pattern", "rope.freq_base_swa", "rope.scaling.attn_factor", "unheard.of"]
    keys = st.sampled_from([*metadata, *(f"{architecture}.{key}" for key in others)])
    file = copy.copy(files)
    file.metadata = metadata | data.draw(st.dictionaries(keys, anything(), min_size=1, max_size=3))
    try:
        resolve(read_config(file))
        map_tensors(file)
    except TenfoldError:
        return


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFFile:
    return model_file(tmp_path_factory.mktemp("files") / "a.gguf", metadata_of("llama"))
