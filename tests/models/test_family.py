"""Reading configurations: what is found, what layers look like, and what is refused."""

from typing import Any

import pytest

from tenfold.base.errors import ConfigError, UnsupportedModelError
from tenfold.kernels.attention import AttentionSpec
from tenfold.models.family import resolve
from tests.parity.cases import SIZES

FULL, SLIDING = "full_attention", "sliding_attention"


def config(architecture: str, **own: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": architecture.lower(), **SIZES, **own}


def windows(hf: dict[str, Any]) -> list[int | None]:
    return [spec.reach.window for spec in resolve(hf).cache_specs()]


def test_unknown_architecture_names_the_nearest_family() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Qwen9MoeForCausalLM.*nearest supported one is Qwen.MoeForCausalLM"
    ):
        resolve(config("Qwen9MoeForCausalLM"))


def test_multimodal_gemma_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Gemma3ForConditionalGeneration.*Gemma3ForCausalLM"):
        resolve({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"hidden_size": 48}})


def test_config_without_architectures_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="none; model_type 'llama'"):
        resolve({"model_type": "llama", **SIZES})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_missing_size_is_named(key: str) -> None:
    hf = config("LlamaForCausalLM")
    del hf[key]
    with pytest.raises(ConfigError, match=key):
        resolve(hf)


def test_heads_must_share_keys_evenly() -> None:
    with pytest.raises(ConfigError, match="6 attention heads, not a multiple of its 4"):
        resolve(config("LlamaForCausalLM", num_key_value_heads=4))


def test_mistral_slides_by_default_in_every_layer_and_null_means_never() -> None:
    assert windows(config("MistralForCausalLM")) == [4096] * 3
    assert windows(config("MistralForCausalLM", sliding_window=None)) == [None] * 3
    with pytest.raises(UnsupportedModelError, match="layer_types"):
        resolve(config("MistralForCausalLM", layer_types=[FULL, SLIDING, FULL]))


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_qwen_slides_above_max_window_layers_if_asked(architecture: str) -> None:
    given = {"sliding_window": 9, "max_window_layers": 2}
    assert windows(config(architecture, **given)) == [None] * 3
    assert windows(config(architecture, use_sliding_window=True, **given)) == [None, None, 9]
    assert windows(config(architecture, use_sliding_window=True, sliding_window=9)) == [None] * 3  # 28 by default


def test_sliding_layers_need_a_window() -> None:
    with pytest.raises(ConfigError, match="no sliding_window"):
        resolve(config("Qwen2ForCausalLM", layer_types=[FULL, SLIDING, FULL], sliding_window=9))
    with pytest.raises(ConfigError, match="no sliding_window"):
        resolve(config("Gemma2ForCausalLM", sliding_window=None))


@pytest.mark.parametrize(
    ("architecture", "pattern"),
    [("Gemma2ForCausalLM", "sfsfsfsf"), ("Gemma3ForCausalLM", "sssssfss"), ("Olmo3ForCausalLM", "sssfsssf")],
)
def test_default_patterns(architecture: str, pattern: str) -> None:
    hf = config(architecture, num_hidden_layers=8, sliding_window=9)
    assert windows(hf) == [9 if letter == "s" else None for letter in pattern]


def test_gemma3_rotates_by_layer_type() -> None:
    model = resolve(config("Gemma3ForCausalLM", sliding_window_pattern=2))
    assert [spec.rope for spec in model.kinds()] == ["sliding", "full", "sliding"]
    c: Any = model.config
    assert (c.rope.theta, c.sliding_rope.theta) == (1e6, 1e4)


def test_old_scaling_is_for_the_full_layers_alone() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    for architecture in ("Gemma3ForCausalLM", "Olmo3ForCausalLM"):
        c: Any = resolve(config(architecture, rope_scaling=scaling)).config
        assert (c.rope.kind, c.rope.factor, c.sliding_rope.kind) == ("linear", 8.0, "default")


def test_rope_parameters_must_have_the_family_s_shape() -> None:
    flat = {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(ConfigError, match="keyed by layer type"):
        resolve(config("Olmo3ForCausalLM", rope_parameters=flat))
    with pytest.raises(ConfigError, match="share one rotation"):
        resolve(config("LlamaForCausalLM", rope_parameters={FULL: flat}))
    with pytest.raises(ConfigError, match="both rope_parameters and rope_scaling"):
        resolve(config("LlamaForCausalLM", rope_parameters=flat, rope_scaling={"type": "linear", "factor": 2.0}))


def test_smollm3_leaves_every_fourth_layer_unrotated() -> None:
    kinds = resolve(config("SmolLM3ForCausalLM", num_hidden_layers=5)).kinds()
    assert [spec.rope for spec in kinds] == ["default", "default", "default", None, "default"]
    with pytest.raises(ConfigError, match="2 no_rope_layers for 3 layers"):
        resolve(config("SmolLM3ForCausalLM", no_rope_layers=[1, 0]))


def test_phi3_knows_longrope_and_no_other_scaling() -> None:
    with pytest.raises(UnsupportedModelError, match="yarn"):
        resolve(config("Phi3ForCausalLM", rope_scaling={"type": "yarn", "factor": 2.0}))


def test_gemma2_attention() -> None:
    model = resolve(config("Gemma2ForCausalLM", query_pre_attn_scalar=16, sliding_window=9))
    assert model.kinds() == (
        AttentionSpec(scale=0.25, window=9, softcap=50.0),
        AttentionSpec(scale=0.25, window=None, softcap=50.0),
        AttentionSpec(scale=0.25, window=9, softcap=50.0),
    )


def test_with_max_len_changes_that_alone() -> None:
    model = resolve(config("Phi3ForCausalLM"))
    shorter = model.with_max_len(99)
    assert shorter.config.max_len == 99
    assert shorter.with_max_len(model.config.max_len) == model


QWEN3_MOE = {"moe_intermediate_size": 12, "num_experts": 9}


def sparse(hf: dict[str, Any]) -> list[bool]:
    return ["router" in layer for layer in resolve(hf).params()["layers"]]


def test_which_layers_of_qwen_are_mixtures() -> None:
    hf = config("Qwen3MoeForCausalLM", **QWEN3_MOE, num_hidden_layers=5)
    assert sparse(hf) == [True] * 5
    assert sparse(hf | {"decoder_sparse_step": 2}) == [False, True, False, True, False]
    assert sparse(hf | {"mlp_only_layers": [0, 3]}) == [False, True, True, False, True]


def test_a_token_chooses_some_of_the_experts() -> None:
    for top_k in (0, 10):
        with pytest.raises(ConfigError, match=f"num_experts_per_tok={top_k} of 9 experts"):
            resolve(config("Qwen3MoeForCausalLM", **QWEN3_MOE, num_experts_per_tok=top_k))
    with pytest.raises(ConfigError, match="num_experts=0"):
        resolve(config("Qwen3MoeForCausalLM", **QWEN3_MOE | {"num_experts": 0}))
