"""Reading configurations: what is found, what layers look like, and what is refused."""

from typing import Any

import pytest

from tenfold.base.errors import ConfigError, UnsupportedModelError
from tenfold.base.files import matches
from tenfold.kernels.attention import AttentionSpec
from tenfold.models.family import resolve
from tenfold.nn.cache import KeyValueSpec
from tenfold.nn.param import count, leaves
from tests.parity.cases import SIZES

FULL, SLIDING = "full_attention", "sliding_attention"


def config(architecture: str, **own: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": architecture.lower(), **SIZES, **own}


def windows(hf: dict[str, Any]) -> list[int | None]:
    return [spec.reach.window for spec in resolve(hf).cache_specs() if spec]


def test_unknown_architecture_names_the_nearest_family() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"Qwen9MoeForCausalLM.*nearest supported one is Qwen.MoeForCausalLM"
    ):
        resolve(config("Qwen9MoeForCausalLM"))


def test_of_multimodal_gemma_the_text_part_is_read() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    hf = {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"hidden_size": 1152}}
    c: Any = resolve(hf | {"text_config": text}).config
    assert (c.V, c.D, c.L, c.H, c.J, c.K, c.max_len) == (262208, 2560, 34, 8, 4, 256, 131072)  # gemma-3-4b
    with pytest.raises(UnsupportedModelError, match="per_layer_config"):
        resolve(hf | {"text_config": text | {"per_layer_config": {"0": {"head_dim": 8}}}})


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


@pytest.mark.parametrize(
    ("architecture", "key", "value"),
    [
        ("CohereForCausalLM", "use_parallel_block", False),
        ("Cohere2ForCausalLM", "use_qk_norm", True),
        ("Cohere2ForCausalLM", "use_gated_activation", False),
        ("Cohere2ForCausalLM", "rotary_pct", 0.5),
        ("Exaone4ForCausalLM", "attention_bias", True),
        ("Exaone4ForCausalLM", "sliding_window_pattern", "LLLG"),
        ("Ministral3ForCausalLM", "layer_types", [FULL] * 3),
        ("GlmForCausalLM", "mlp_bias", True),
        ("PhiForCausalLM", "qk_layernorm", True),
        ("OPTForCausalLM", "layer_norm_elementwise_affine", False),
        ("Gemma3nForCausalLM", "attention_bias", True),
        ("Gemma3nForCausalLM", "tie_word_embeddings", False),
        ("Gemma4ForCausalLM", "enable_moe_block", True),
        ("Gemma4ForCausalLM", "use_bidirectional_attention", "all"),
        ("Gemma4ForCausalLM", "per_layer_config", {"2": {"sliding_window": 3}}),
    ],
)
def test_what_a_family_lacks_is_refused_by_name(architecture: str, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        resolve(config(architecture, **{key: value}))


def test_cohere2_and_exaone4_rotate_in_sliding_layers_alone() -> None:
    for architecture in ("Cohere2ForCausalLM", "Exaone4ForCausalLM"):
        model = resolve(config(architecture, num_hidden_layers=5))
        assert [spec.window for spec in model.kinds()] == [4096, 4096, 4096, None, 4096]
        assert [spec.rope is None for spec in model.kinds()] == [False, False, False, True, False]
    full = resolve(config("Exaone4ForCausalLM", sliding_window=None))
    assert full.kinds() == (AttentionSpec(scale=8**-0.5),) * 3


def test_ministral3_has_yarn_by_default() -> None:
    c: Any = resolve(config("Ministral3ForCausalLM")).config
    assert (c.rope.kind, c.rope.factor, c.rope.original_len, c.query_beta) == ("yarn", 16.0, 16384, 0.1)
    c = resolve(config("Ministral3ForCausalLM", rope_theta=1e4)).config
    assert (c.rope.kind, c.query_beta) == ("default", None)


def test_gemma4_reads_heads_by_layer_in_both_spellings() -> None:
    sizes = {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL, SLIDING, FULL], "attention_k_eq_v": True}
    old = config("Gemma4ForCausalLM", **sizes, head_dim=12, global_head_dim=20, num_global_key_value_heads=3)
    own = {"head_dim": 20, "num_key_value_heads": 3}
    new = config("Gemma4ForCausalLM", **sizes, head_dim=12, per_layer_config={"01": own, "03": own})
    assert resolve(old) == resolve(new)
    assert resolve(old).cache_specs()[:2] == (KeyValueSpec(2, 12, 512), KeyValueSpec(3, 20))
    with pytest.raises(ConfigError, match="of different sizes"):
        resolve(config("Gemma4ForCausalLM", **sizes, per_layer_config={"1": own}))


def test_layers_that_share_a_cache_have_none() -> None:
    sizes = {"num_hidden_layers": 7, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 9}
    sizes |= {"tie_word_embeddings": True, "num_kv_shared_layers": 2}
    sizes |= {"layer_types": [SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL]}
    for architecture in ("Gemma3nForCausalLM", "Gemma4ForCausalLM"):
        model = resolve(config(architecture, **sizes))
        assert [spec == () for spec in model.cache_specs()] == [False] * 5 + [True] * 2
        assert any("layers.6.self_attn.[kv]_proj" in pattern for pattern in model.skipped())
    with pytest.raises(ConfigError, match="num_kv_shared_layers=6"):
        resolve(config("Gemma3nForCausalLM", **sizes | {"num_kv_shared_layers": 6}))


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


def test_which_layers_of_glm_and_llama4_are_mixtures() -> None:
    glm = config("Glm4MoeForCausalLM", moe_intermediate_size=12, first_k_dense_replace=2)
    assert sparse(glm) == [False, False, True]
    llama = config("Llama4ForCausalLM", intermediate_size_mlp=12)
    assert sparse(llama) == [True] * 3
    assert sparse(llama | {"interleave_moe_layer_step": 2}) == [False, True, False]
    assert sparse(llama | {"moe_layers": [0]}) == [True, False, False]


def test_llama4_sees_chunks_where_it_rotates() -> None:
    kinds = resolve(config("Llama4ForCausalLM", intermediate_size_mlp=12, num_hidden_layers=5)).kinds()
    assert [(spec.rope, spec.chunk) for spec in kinds] == [("default", 8192)] * 3 + [(None, None), ("default", 8192)]
    for wrong in ({"layer_types": [FULL] * 2}, {"no_rope_layers": [1]}, {"attention_chunk_size": None}):
        with pytest.raises(ConfigError, match="for 3 layers"):
            resolve(config("Llama4ForCausalLM", intermediate_size_mlp=12, **wrong))
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        resolve(config("Llama4ForCausalLM", intermediate_size_mlp=12, layer_types=[SLIDING] * 3))


def test_llama4_is_read_out_of_a_model_that_sees_images() -> None:
    text = config("Llama4ForCausalLM", intermediate_size_mlp=12)
    whole = resolve({"architectures": ["Llama4ForConditionalGeneration"], "text_config": text, "vision_config": {}})
    names = {source.name for _, p in leaves(whole.params()) for source in p.sources}
    assert all(name.startswith(("language_model.model.", "language_model.lm_head.")) for name in names)
    assert not any(matches(name, whole.skipped()) for name in names)
    assert matches("vision_model.model.layers.0.mlp.fc1.bias", whole.skipped())
    assert count(whole.params()) == count(resolve(text).params())


@pytest.mark.parametrize(
    ("architecture", "own", "message"),
    [
        ("MiniMaxM2ForCausalLM", {"scoring_func": "softmax"}, "scoring_func"),
        ("MiniMaxM2ForCausalLM", {"use_routing_bias": False}, "use_routing_bias"),
        ("MiniMaxM2ForCausalLM", {"qk_norm_type": "per_head"}, "qk_norm_type"),
        ("MiniMaxM2ForCausalLM", {"shared_intermediate_size": 8}, "shared_intermediate_size"),
        ("MiniMaxM2ForCausalLM", {"attn_type_list": [1, 0, 1]}, "attn_type_list"),
        ("MixtralForCausalLM", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_mixtures_do_not_implement_is_refused(architecture: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        resolve(config(architecture, **own))


def test_a_token_chooses_some_of_the_experts() -> None:
    for top_k in (0, 10):
        with pytest.raises(ConfigError, match=f"num_experts_per_tok={top_k} of 9 experts"):
            resolve(config("Qwen3MoeForCausalLM", **QWEN3_MOE, num_experts_per_tok=top_k))
    with pytest.raises(ConfigError, match="num_experts=0"):
        resolve(config("Qwen3MoeForCausalLM", **QWEN3_MOE | {"num_experts": 0}))


def test_layers_that_predict_further_tokens_are_skipped() -> None:
    model = resolve(config("Glm4MoeForCausalLM", moe_intermediate_size=12))
    assert matches("model.layers.3.eh_proj.weight", model.skipped())
    assert not matches("model.layers.2.mlp.gate.weight", model.skipped())
    assert resolve(config("LlamaForCausalLM")).skipped() == ()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("architecture", "own", "four", "five"),
    [
        ("GptOssForCausalLM", {}, {"rope_theta": 9e4, "rope_scaling": YARN}, YARN | {"rope_theta": 9e4}),
        (
            "Llama4ForCausalLM",
            {"intermediate_size_mlp": 12},
            {"rope_theta": 9e4, "rope_scaling": LLAMA3},
            LLAMA3 | {"rope_theta": 9e4},
        ),
        (
            "Glm4MoeForCausalLM",
            {"moe_intermediate_size": 12},
            {"rope_theta": 9e4, "partial_rotary_factor": 0.5},
            {"rope_type": "default", "rope_theta": 9e4, "partial_rotary_factor": 0.5},
        ),
        (
            "MiniMaxM2ForCausalLM",
            {"head_dim": 12},
            {"rope_theta": 9e4, "rotary_dim": 6},
            {"rope_type": "default", "rope_theta": 9e4, "partial_rotary_factor": 0.5},
        ),
    ],
)
def test_transformers_4_and_5_spell_the_same_rotation(
    architecture: str, own: dict[str, Any], four: dict[str, Any], five: dict[str, Any]
) -> None:
    assert resolve(config(architecture, **own, **four)) == resolve(config(architecture, **own, rope_parameters=five))
