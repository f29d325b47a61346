"""The same model spelled as transformers 4 and as transformers 5 spell it."""

import pytest

from tenfold.base.errors import ConfigError, UnsupportedModelError
from tenfold.nn import hf_config
from tenfold.nn.hf_config import HFConfig
from tenfold.nn.rope import Rope

SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LONG = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}

SPELLINGS = {
    "plain": (
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        Rope(theta=500000.0, dims=16, original_len=8192),
    ),
    "llama 3.1": (
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
        Rope(kind="llama3", theta=500000.0, dims=16, original_len=1024, factor=8.0, low=1.0, high=4.0),
    ),
    "linear, by its old name": (
        {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        Rope(kind="linear", dims=16, original_len=8192, factor=2.0),
    ),
    "phi-3": (
        {
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", **LONG},
        },
        {
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096,
                **LONG,
            },
        },
        Rope(
            kind="longrope",
            dims=12,
            original_len=4096,
            short=(1.0,) * 6,
            long=(2.0,) * 6,
            attention_factor=1.0408329997330663,  # sqrt(1 + ln 2 / ln 4096)
        ),
    ),
    "no base at all": ({}, {"rope_parameters": {"rope_type": "default"}}, Rope(dims=16, original_len=8192)),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_both_spellings_give_the_same_rope(case: str) -> None:
    old, new, expected = SPELLINGS[case]
    assert hf_config.read_rope({**SIZES, **old}) == expected
    assert hf_config.read_rope({**SIZES, **new}) == expected


GEMMA_4 = {
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
GEMMA_5 = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
}


@pytest.mark.parametrize("spelling", [GEMMA_4, GEMMA_5], ids=["transformers 4", "transformers 5"])
def test_layer_types_have_their_own_base(spelling: HFConfig) -> None:
    hf = {**SIZES, **spelling}
    full = hf_config.read_rope(hf, layer_type="full_attention")
    sliding = hf_config.read_sliding_rope(hf, theta_key="rope_local_base_freq", default_theta=10_000.0)
    assert full == Rope(kind="linear", theta=1_000_000.0, dims=16, original_len=8192, factor=8.0)
    assert sliding == Rope(theta=10_000.0, dims=16, original_len=8192)


@pytest.mark.parametrize(
    ("keys", "layer_type", "message"),
    [
        ({"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}}, None, "both"),
        (GEMMA_5, None, "keyed by layer type"),
        ({"rope_parameters": LLAMA3}, "full_attention", "must be keyed by layer type"),
    ],
)
def test_rope_that_could_be_misread_is_refused(keys: HFConfig, layer_type: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf_config.read_rope({**SIZES, **keys}, layer_type=layer_type)


S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"layer_types": [S, F, F, S, S]}, (S, F, F, S, S)),
        ({"sliding_window_pattern": 2}, (S, F, S, F, S)),
        ({"_sliding_window_pattern": 4}, (S, S, S, F, S)),
        ({}, (S, S, F, S, S)),
    ],
)
def test_layer_types_in_every_spelling(keys: HFConfig, expected: tuple[str, ...]) -> None:
    assert hf_config.read_layer_types({**SIZES, **keys}, period=3, num_layers=5) == expected


def test_unknown_or_too_few_layer_types_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"\['linear_attention'\]"):
        hf_config.read_layer_types({"layer_types": ["linear_attention", F]}, period=1, num_layers=2)
    with pytest.raises(ConfigError, match="1 layer_types for 2 layers"):
        hf_config.read_layer_types({"layer_types": [F]}, period=1, num_layers=2)


def test_windows_go_to_sliding_layers() -> None:
    assert hf_config.read_windows((S, F, S), 128) == (128, None, 128)
    assert hf_config.read_windows((F, F), None) == (None, None)
    with pytest.raises(ConfigError, match="no sliding_window"):
        hf_config.read_windows((F, S), None)


def test_late_layers_read_the_last_earlier_one_of_their_type() -> None:
    assert hf_config.read_cache_sources((S, F, S, S, F), 2) == (None, None, None, 2, 1)
    assert hf_config.read_cache_sources((S, F), 0) == (None, None)
    with pytest.raises(ConfigError, match="num_kv_shared_layers=1, but no full_attention layer before"):
        hf_config.read_cache_sources((S, F), 1)
    with pytest.raises(ConfigError, match="num_kv_shared_layers=3, but no sliding_attention layer before"):
        hf_config.read_cache_sources((S, F), 3)


def test_sizes_have_their_defaults() -> None:
    assert hf_config.head_dim(SIZES) == 16
    assert hf_config.head_dim({**SIZES, "head_dim": 24}) == 24
    assert hf_config.head_dim({**SIZES, "head_dim": None}) == 16
    assert hf_config.kv_heads(SIZES) == 2
    assert hf_config.kv_heads({**SIZES, "num_key_value_heads": None}) == 4
    with pytest.raises(ConfigError, match="not a multiple"):
        hf_config.kv_heads({**SIZES, "num_key_value_heads": 3})


def test_what_is_missing_or_not_implemented_is_named() -> None:
    with pytest.raises(ConfigError, match="no 'vocab_size', which llama needs"):
        hf_config.require(SIZES, "vocab_size")
    with pytest.raises(UnsupportedModelError, match="attn_bias=True"):
        hf_config.refuse({"attn_bias": True}, attn_bias=False)
    hf_config.refuse({"attn_bias": False, "other": None}, attn_bias=False, other=1)
    with pytest.raises(UnsupportedModelError, match="'tanh' is not implemented; known: silu"):
        hf_config.read_activation({"hidden_act": "tanh"})
