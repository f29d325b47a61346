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
    "num_experts": 4,  # of layers that are refused
    "top_k_experts": 2,
    "moe_intermediate_size": 30,
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
}
REFUSED = {
    "is_encoder_decoder": True,
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
    "gemma4": {"text_config": SIZES | OWN_INPUTS},
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
    "logit_scale": (0.3, {}),
    "use_qk_norm": (True, {}),
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
    ("gpt2", "tie_word_embeddings"): (False, {}),
    ("exaone4", "layer_types"): (SLIDING["layer_types"], {"sliding_window": 7}),
    ("smollm3", "sliding_window"): (5, {"use_sliding_window": True, "no_rope_layers": [1, 0, 1]}),
}
REFUSED_BY_FAMILY: dict[str, dict[str, Any]] = {
    "gemma3_text": {"attn_logit_softcapping": 11.0},
    "gemma3n_text": {"attention_bias": True, "tie_word_embeddings": False},
    "gemma4_text": {"enable_moe_block": True},
}
WITHOUT_A_CASE = ["Gemma3nForConditionalGeneration"]  # transformers makes its vision tower of another library's layers

PAIRS = [(model_type, key) for model_type, keys in KEYS.items() for key in keys]


def base(model_type: str) -> dict[str, Any]:
    own = OWN_SIZES.get(model_type, {})
    return {**SIZES, **own, "architectures": [ARCHITECTURES[model_type]], "model_type": model_type}


def test_every_family_is_here() -> None:
    assert sorted([*(ARCHITECTURES[model_type] for model_type in KEYS), *WITHOUT_A_CASE]) == sorted(FAMILIES)


@pytest.mark.parametrize(("model_type", "key"), PAIRS)
def test_key_is_honoured_refused_or_irrelevant(model_type: str, key: str) -> None:
    config = base(model_type)
    refused = REFUSED | REFUSED_BY_FAMILY.get(model_type, {})
    if key in refused:
        with pytest.raises(UnsupportedModelError, match=key):
            resolve(config | {key: refused[key]})
    elif key in IRRELEVANT:
        value = IRRELEVANT[key] if IRRELEVANT[key] is not None else config[key]
        assert resolve(config | {key: value}) == resolve(config)
    else:
        value, others = OVERRIDES.get((model_type, key)) or HONOURED[key]
        config |= others
        assert resolve(config | {key: value}).config != resolve(config).config


def having(key: str) -> list[str]:
    return [model_type for model_type in sorted(KEYS) if key in KEYS[model_type]]


@pytest.mark.parametrize("model_type", [each for each in sorted(KEYS) if each not in ("gemma4", "gemma4_text")])
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
    if (model_type, "rope_parameters") in OVERRIDES:
        rope = {"full_attention": rope}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        resolve(base(model_type) | {"rope_parameters": rope})
