"""Every key that transformers knows in a family's config.json is honoured, refused, or has no bearing on inference.

The keys come from transformers' own configuration classes (`tests/parity/reference.py` wrote them down).
"""

import json
from typing import Any

import pytest

from tenfold.base.errors import UnsupportedModelError
from tenfold.models import FAMILIES
from tenfold.models.family import resolve
from tests.parity.cases import CASES, GPT2, SIZES
from tests.parity.golden import DIRECTORY

KEYS: dict[str, list[str]] = json.loads((DIRECTORY / "config_keys.json").read_text())
ARCHITECTURES = {case.config["model_type"]: case.config["architectures"][0] for case in CASES}

IRRELEVANT = {
    "_name_or_path": "elsewhere",
    "architectures": None,  # these two choose the family
    "model_type": None,
    "dtype": "bfloat16",  # the engine's business, and the checkpoint's
    "transformers_version": "4.0.0",
    "attention_dropout": 0.3,
    "embd_pdrop": 0.3,
    "resid_pdrop": 0.3,
    "initializer_range": 0.5,
    "pretraining_tp": 2,  # the same sums in another order
    "chunk_size_feed_forward": 4,
    "use_cache": False,
    "bos_token_id": 3,  # the engine reads end tokens
    "eos_token_id": [4, 5],
    "pad_token_id": 6,
    "return_dict": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "attn_pdrop": 0.3,
    "dropout": 0.3,
    "layerdrop": 0.3,
    "residual_dropout": 0.3,
    "init_std": 0.5,
    "reorder_and_upcast_attn": True,  # scores are float32 anyway
    "summary_activation": "tanh",
    "summary_first_dropout": 0.3,
    "summary_proj_to_labels": False,
    "summary_type": "last",
    "summary_use_proj": False,
    "altup_coef_clip": 1.0,  # while training
    "vision_config": {"hidden_size": 30},  # text alone
    "audio_config": {"hidden_size": 30},
    "mm_tokens_per_image": 3,
    **dict.fromkeys(
        (
            f"{name}_token_{kind}"
            for name in ("boi", "eoi", "image", "video", "boa", "eoa", "audio")
            for kind in ("id", "index")
        ),
        7,
    ),
    "problem_type": "regression",
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "output_router_logits": True,  # these are for training
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "num_mtp_layers": 2,  # layers after the last are not used
    "num_nextn_predict_layers": 2,
}
REFUSED = {
    "is_encoder_decoder": True,
    "add_cross_attention": True,
    "use_bidirectional_attention": True,
    "layer_norm_elementwise_affine": False,
    "qk_layernorm": True,
}
OWN_INPUTS = {"vocab_size_per_layer_input": 90, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "opt": {"ffn_dim": 68},
    "gemma3": {"text_config": SIZES},
    "gemma3n_text": OWN_INPUTS | {"tie_word_embeddings": True},
    "gemma4_text": OWN_INPUTS,
}
SLIDING = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
# A value that must make a difference, and what else the config must say for it to.
HONOURED: dict[str, tuple[Any, dict[str, Any]]] = {
    "vocab_size": (98, {}),
    "hidden_size": (96, {}),
    "intermediate_size": (70, {}),
    "num_hidden_layers": (4, {}),
    "num_attention_heads": (12, {}),
    "num_key_value_heads": (3, {}),
    "head_dim": (20, {}),
    "max_position_embeddings": (512, {}),
    "original_max_position_embeddings": (64, {}),
    "rms_norm_eps": (1e-4, {}),
    "layer_norm_eps": (1e-4, {}),
    "layer_norm_epsilon": (1e-4, {}),
    "tie_word_embeddings": (True, {}),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 77.0}, {}),
    "hidden_act": ("gelu", {}),
    "hidden_activation": ("gelu", {}),
    "attention_bias": (True, {}),
    "mlp_bias": (True, {}),
    "sliding_window": (5, {"use_sliding_window": True, "max_window_layers": 1}),
    "use_sliding_window": (True, {"sliding_window": 7, "max_window_layers": 1, "no_rope_layers": [1, 0, 1]}),
    "max_window_layers": (2, WINDOWED),
    "layer_types": (SLIDING["layer_types"], {"use_sliding_window": True, "sliding_window": 7}),
    "_sliding_window_pattern": (2, {}),
    "no_rope_layers": ([0, 1, 1], {}),
    "no_rope_layer_interval": (2, {}),
    "query_pre_attn_scalar": (7, {}),
    "attn_logit_softcapping": (11.0, {}),
    "final_logit_softcapping": (11.0, {}),
    "num_experts": (14, {}),
    "num_local_experts": (14, {}),
    "n_routed_experts": (8, {}),
    "n_shared_experts": (2, {}),
    "num_experts_per_tok": (3, {}),
    "norm_topk_prob": (True, {}),
    "moe_intermediate_size": (10, {}),
    "shared_expert_intermediate_size": (10, {}),
    "moe_shared_expert_intermediate_size": (10, {}),
    "moe_latent_size": (10, {}),
    "intermediate_size_mlp": (10, {}),
    "decoder_sparse_step": (2, {}),
    "mlp_only_layers": ([1], {}),
    "first_k_dense_replace": (2, {}),
    "moe_layers": ([2], {}),
    "interleave_moe_layer_step": (2, {}),
    "n_group": (2, {}),
    "topk_group": (2, {"n_group": 2}),
    "routed_scaling_factor": (2.0, {}),
    "use_qk_norm": (True, {}),
    "qkv_bias": (False, {}),
    "clip_qkv": (3.0, {}),
    "swiglu_alpha": (1.5, {}),
    "swiglu_limit": (1.5, {}),
    "attention_chunk_size": (16, {}),
    "attn_temperature_tuning": (False, {}),
    "floor_scale": (16, {}),
    "attn_scale": (0.5, {}),
    "logit_scale": (0.3, {}),
    "sliding_window_pattern": (2, {}),
    "attention_multiplier": (0.3, {}),
    "embedding_multiplier": (0.3, {}),
    "logits_scaling": (0.3, {}),
    "residual_multiplier": (0.3, {}),
    "attention_out_bias": (True, {}),
    "activation_function": ("silu", {}),
    "n_embd": (96, {}),
    "n_head": (12, {}),
    "n_inner": (70, {}),
    "n_layer": (4, {}),
    "n_positions": (512, {}),
    "scale_attn_by_inverse_layer_idx": (True, {}),
    "scale_attn_weights": (False, {}),
    "ffn_dim": (70, {}),
    "word_embed_proj_dim": (20, {}),
    "do_layer_norm_before": (False, {}),
    "_remove_final_layer_norm": (True, {}),
    "enable_bias": (False, {}),
    "text_config": (SIZES | OWN_INPUTS | {"hidden_size": 96}, {}),
    "vocab_size_per_layer_input": (91, {}),
    "hidden_size_per_layer_input": (9, {}),
    "num_kv_shared_layers": (1, {"layer_types": SLIDING["layer_types"]}),
    "laurel_rank": (5, {}),
    "altup_num_inputs": (3, {}),
    "altup_active_idx": (1, {}),
    "altup_correct_scale": (False, {}),
    "activation_sparsity_pattern": ([0.5, 0.0, 0.0], {}),
    "attention_k_eq_v": (True, {}),
    "use_double_wide_mlp": (True, {"num_kv_shared_layers": 1, "layer_types": SLIDING["layer_types"]}),
    "per_layer_config": ({"2": {"head_dim": 20}}, {}),
}
NESTED_ROPE = {"full_attention": {"rope_theta": 77.0}, "sliding_attention": {"rope_theta": 7.0}}
OVERRIDES: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {
    ("gemma3_text", "rope_parameters"): (NESTED_ROPE, {}),
    ("gemma3n_text", "rope_parameters"): (NESTED_ROPE, {}),
    ("gemma4_text", "rope_parameters"): (NESTED_ROPE, {}),
    ("olmo3", "rope_parameters"): (NESTED_ROPE, {}),
    ("glm", "attention_bias"): (False, {}),
    ("glm4", "attention_bias"): (False, {}),
    ("seed_oss", "attention_bias"): (False, {}),
    ("gpt2", "tie_word_embeddings"): (True, {}),
    ("exaone4", "layer_types"): (SLIDING["layer_types"], {"sliding_window": 7}),
    ("llama4_text", "layer_types"): (["full_attention", "chunked_attention", "full_attention"], {}),
    ("llama4_text", "use_qk_norm"): (False, {}),
    ("glm4_moe", "norm_topk_prob"): (False, {}),
    ("gpt_oss", "attention_bias"): (False, {}),
    ("qwen2_moe", "max_window_layers"): (3, WINDOWED),
    ("smollm3", "sliding_window"): (5, {"use_sliding_window": True, "no_rope_layers": [1, 0, 1]}),
}
OVERRIDES |= {
    ("qwen3_next", "layer_types"): (["full_attention", "linear_attention", "full_attention"], {}),
    ("qwen3_next", "norm_topk_prob"): (False, {}),
    ("qwen3_5_text", "layer_types"): (["full_attention", "linear_attention", "full_attention"], {}),
    ("qwen3_5_moe_text", "layer_types"): (["full_attention", "linear_attention", "full_attention"], {}),
    ("granitemoehybrid", "layer_types"): (["linear_attention", "full_attention", "linear_attention"], {}),
    ("granitemoehybrid", "rope_parameters"): ({"rope_theta": 77.0}, {"position_embedding_type": "rope"}),
    ("granitemoehybrid", "mamba_n_heads"): (12, {}),
    ("nemotron_h", "layers_block_type"): (["mlp", "full_attention"], {}),
    ("nemotron_h", "n_routed_experts"): (12, {}),
    ("nemotron_h", "norm_topk_prob"): (False, {}),
    ("nemotron_h", "topk_group"): (2, {"n_group": 4}),
    ("deepseek_v3", "norm_topk_prob"): (False, {}),
    ("deepseek_v3", "topk_group"): (2, {}),
    ("deepseek_v3", "n_group"): (4, {}),
    ("deepseek_v2", "n_shared_experts"): (3, {}),
    ("deepseek_v2", "n_group"): (2, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}),
    ("deepseek_v2", "topk_group"): (2, {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1}),
    ("qwen3_next", "head_dim"): (24, {}),
    ("qwen3_5_text", "head_dim"): (24, {}),
    ("qwen3_5_moe_text", "head_dim"): (24, {}),
}
HYBRID: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear_conv_kernel_dim": (3, {}),
    "linear_key_head_dim": (24, {}),
    "linear_value_head_dim": (24, {}),
    "linear_num_key_heads": (8, {}),
    "linear_num_value_heads": (64, {}),
    "mamba_d_ssm": (256, {}),
    "mamba_n_heads": (64, {}),
    "mamba_n_groups": (2, {}),
    "mamba_d_state": (16, {}),
    "mamba_d_conv": (3, {}),
    "mamba_expand": (4, {"mamba_d_ssm": None, "mamba_n_heads": 6}),
    "mamba_conv_bias": (False, {}),
    "mamba_proj_bias": (True, {}),
    "mamba_rms_norm": (True, {}),
    "mamba_norm_before_gate": (False, {"mamba_rms_norm": True}),
    "time_step_limit": ([0.1, 1.0], {}),
    "projectors_bias": (True, {}),
    "lm_head_multiplier": (2.0, {}),
    "embedding_multiplier": (2.0, {}),
    "mlp_multipliers": ([2.0, 3.0], {}),
    "key_multiplier": (2.0, {}),
    "attention_in_multiplier": (2.0, {}),
    "attention_out_multiplier": (2.0, {}),
    "ssm_multipliers": ([1.0, 2.0, 3.0, 4.0, 5.0], {}),
    "ssm_in_multiplier": (2.0, {}),
    "ssm_out_multiplier": (2.0, {}),
    "attention_multiplier": (2.0, {}),
    "residual_multiplier": (2.0, {}),
    "logits_scaling": (2.0, {}),
    "shared_intermediate_size": (36, {}),
    "position_embedding_type": ("rope", {}),
    "ssm_state_size": (16, {}),
    "mamba_num_heads": (6, {}),
    "mamba_head_dim": (8, {}),
    "mamba_hidden_act": ("gelu", {}),
    "mlp_hidden_act": ("gelu", {}),
    "n_groups": (2, {}),
    "conv_kernel": (3, {}),
    "use_bias": (True, {}),
    "use_conv_bias": (False, {}),
    "layer_norm_epsilon": (1e-4, {}),
    "kv_lora_rank": (20, {}),
    "q_lora_rank": (None, {}),
    "qk_nope_head_dim": (10, {}),
    "qk_rope_head_dim": (6, {}),
    "v_head_dim": (10, {}),
    "topk_method": ("group_limited_greedy", {"n_group": 4, "topk_group": 2}),
    "rope_interleave": (False, {}),
}
UNUSED = {
    "gemma4_text": ("num_experts", "top_k_experts", "moe_intermediate_size"),  # of layers that are refused
    "falcon_h1": ("mamba_d_head", "mamba_chunk_size", "num_logits_to_keep"),  # the first follows from the others
    "granitemoehybrid": ("mamba_d_head", "mamba_chunk_size"),
    "nemotron_h": (
        *("n_shared_experts", "moe_shared_expert_overlap"),  # one, as wide as it says
        *("num_hidden_layers", "num_logits_to_keep", "use_mamba_kernels", "mamba_ssm_cache_dtype", "chunk_size"),
        *("time_step_min", "time_step_max", "time_step_floor", "expand", "mamba_proj_bias"),
        *("hidden_dropout", "rescale_prenorm_residual", "mtp_layers_block_type"),
    ),
    "deepseek_v2": ("num_key_value_heads", "head_dim", "qk_head_dim"),
    "deepseek_v3": ("num_key_value_heads", "head_dim", "qk_head_dim"),
}
REFUSED_BY_FAMILY: dict[str, dict[str, Any]] = {
    "gemma3_text": {"attn_logit_softcapping": 11.0},
    "gemma3n_text": {"attention_bias": True, "tie_word_embeddings": False},
    "gemma4_text": {"enable_moe_block": True},
    "gpt_oss": {"hidden_act": "gelu"},
    "llama4_text": {"hidden_act": "gelu"},
    "nemotron_h": {"attention_bias": True, "sliding_window": 7, "residual_in_fp32": True},
    "deepseek_v2": {"norm_topk_prob": True, "mlp_bias": True},
}
OWN: dict[str, dict[str, Any]] = OWN_SIZES | {  # what a family's sizes need besides SIZES
    "qwen2_moe": {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 12, "num_experts": 6},
    "qwen3_moe": {"moe_intermediate_size": 12, "num_experts": 9},
    "glm4_moe": {"moe_intermediate_size": 12, "n_routed_experts": 12},
    "llama4_text": {"intermediate_size_mlp": 12},
    "qwen3_next": {"num_experts": 12},
    "granitemoehybrid": {"mamba_n_heads": 6},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"]},
    "deepseek_v2": {"num_key_value_heads": 6, "moe_intermediate_size": 12},
    "deepseek_v3": {"num_key_value_heads": 6, "moe_intermediate_size": 12},
}
WRAPPERS = [  # whose text part is a family that has keys here
    "Gemma3nForConditionalGeneration",
    "Gemma4ForConditionalGeneration",
    "Llama4ForConditionalGeneration",
    "Mistral3ForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration",
]

PAIRS = [(model_type, key) for model_type, keys in KEYS.items() for key in keys]


def base(model_type: str) -> dict[str, Any]:
    own = OWN.get(model_type, {})
    return {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type, **SIZES, **own}


def test_every_family_is_here() -> None:
    assert sorted(ARCHITECTURES[model_type] for model_type in KEYS) == sorted(FAMILIES.keys() - set(WRAPPERS))


@pytest.mark.parametrize(("model_type", "key"), PAIRS)
def test_key_is_honoured_refused_or_irrelevant(model_type: str, key: str) -> None:
    config = base(model_type)
    refused = REFUSED | REFUSED_BY_FAMILY.get(model_type, {})
    if key in refused:
        with pytest.raises(UnsupportedModelError, match=key):
            resolve(config | {key: refused[key]})
    elif key in UNUSED.get(model_type, ()):
        assert resolve(config | {key: None}) == resolve(config)
    elif key in IRRELEVANT:
        value = IRRELEVANT[key] if IRRELEVANT[key] is not None else config[key]
        assert resolve(config | {key: value}) == resolve(config)
    else:
        value, others = OVERRIDES.get((model_type, key)) or (HONOURED | HYBRID)[key]
        config |= others
        assert resolve(config | {key: value}).config != resolve(config).config


def having(key: str) -> list[str]:
    return [model_type for model_type in sorted(KEYS) if key in KEYS[model_type]]


@pytest.mark.parametrize("model_type", [each for each in sorted(KEYS) if each != "gemma4_text"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("per_layer_config", {"0": {"num_key_value_heads": 1}}),
        ("add_cross_attention", True),
    ],
)
def test_what_no_family_implements_is_refused_by_name(model_type: str, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        resolve(base(model_type) | {key: value})


@pytest.mark.parametrize(
    ("model_type", "key"),
    [(each, key) for key in ("hidden_act", "hidden_activation", "activation_function") for each in having(key)],
)
def test_unknown_activation_is_refused_by_name(model_type: str, key: str) -> None:
    with pytest.raises(UnsupportedModelError, match="xielu"):
        resolve(base(model_type) | {key: "xielu"})


@pytest.mark.parametrize("model_type", having("rope_parameters"))
def test_unknown_rope_is_refused_by_name(model_type: str) -> None:
    rope: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    given, others = OVERRIDES.get((model_type, "rope_parameters"), ({}, {}))
    if given is NESTED_ROPE:
        rope = {"full_attention": rope}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        resolve(base(model_type) | others | {"rope_parameters": rope})
