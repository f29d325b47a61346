"""What is compared with transformers: tiny checkpoints whose weights are a function of a seed and of their names.

Read by both sides, our interpreter and the one with torch, so it needs nothing but numpy. Sizes are odd, windows are
much shorter than the prompts, and weights are large, so that every feature changes the logits.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_PROMPTS = 32
NEW_TOKENS = 64
LONGEST_PROMPT = 48

TRANSFORMERS_5 = {"dtype": "float32", "transformers_version": "5.23.0"}
TRANSFORMERS_4 = {"torch_dtype": "float32", "transformers_version": "4.40.0"}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 68,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,  # large enough to matter
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,  # nothing ends early
    "pad_token_id": None,
}
SHORT_FACTORS = [1.0, 1.1, 1.3, 1.6, 1.9, 2.3]
LONG_FACTORS = [1.0, 1.7, 2.9, 4.1, 6.3, 8.9]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One checkpoint.

    Attributes:
        name: of its golden file; starts with the family's.
        config: its config.json.
        shortest_prompt: in tokens.
        max_len: the context that our side is configured for; decides longrope's factors.
        engine: it is also run stacked and through the engine, which compile for a while: one for each architecture at
            least.
    """

    name: str
    config: dict[str, Any]
    shortest_prompt: int = 1
    max_len: int = LONGEST_PROMPT + NEW_TOKENS
    engine: bool = False

    @property
    def vocab_size(self) -> int:
        return self.config.get("text_config", self.config)["vocab_size"]


def _rope(kind: str = "default", theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


def _v5(architecture: str, model_type: str, **own: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **SIZES, **TRANSFORMERS_5, **own}


def _v4(architecture: str, model_type: str, **own: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **SIZES, **TRANSFORMERS_4, **own}


def _sliding(pattern: str) -> list[str]:
    return ["full_attention" if letter == "f" else "sliding_attention" for letter in pattern]


LLAMA = ("LlamaForCausalLM", "llama")
MISTRAL = ("MistralForCausalLM", "mistral")
QWEN2 = ("Qwen2ForCausalLM", "qwen2")
QWEN3 = ("Qwen3ForCausalLM", "qwen3")
GEMMA2 = ("Gemma2ForCausalLM", "gemma2")
GEMMA3 = ("Gemma3ForCausalLM", "gemma3_text")
GEMMA3N = ("Gemma3nForCausalLM", "gemma3n_text")
GEMMA4 = ("Gemma4ForCausalLM", "gemma4_text")
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
PHI3 = ("Phi3ForCausalLM", "phi3")
SMOLLM3 = ("SmolLM3ForCausalLM", "smollm3")
OLMO2 = ("Olmo2ForCausalLM", "olmo2")
OLMO3 = ("Olmo3ForCausalLM", "olmo3")
COHERE = ("CohereForCausalLM", "cohere")
COHERE2 = ("Cohere2ForCausalLM", "cohere2")
GRANITE = ("GraniteForCausalLM", "granite")
EXAONE4 = ("Exaone4ForCausalLM", "exaone4")
MINISTRAL3 = ("Ministral3ForCausalLM", "ministral3")
GLM = ("GlmForCausalLM", "glm")
GLM4 = ("Glm4ForCausalLM", "glm4")
PHI = ("PhiForCausalLM", "phi")
OPT = ("OPTForCausalLM", "opt")
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    **{key: SIZES[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
    "n_embd": 48,
    "n_head": 6,
    "n_layer": 3,
    "n_positions": 256,
    "layer_norm_epsilon": 1e-3,
}
SEED_OSS = ("SeedOssForCausalLM", "seed_oss")
QWEN3_NEXT = ("Qwen3NextForCausalLM", "qwen3_next")
QWEN3_5 = ("Qwen3_5ForCausalLM", "qwen3_5_text")
QWEN3_5_MOE = ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text")
FALCON_H1 = ("FalconH1ForCausalLM", "falcon_h1")
GRANITE_HYBRID = ("GraniteMoeHybridForCausalLM", "granitemoehybrid")
NEMOTRON_H = ("NemotronHForCausalLM", "nemotron_h")
DEEPSEEK_V2 = ("DeepseekV2ForCausalLM", "deepseek_v2")
DEEPSEEK_V3 = ("DeepseekV3ForCausalLM", "deepseek_v3")

DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {"mamba_n_heads": 6, "mamba_n_groups": 2, "mamba_d_state": 10, "mamba_d_conv": 4}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
MIXTRAL = ("MixtralForCausalLM", "mixtral")
QWEN2_MOE = ("Qwen2MoeForCausalLM", "qwen2_moe")
QWEN3_MOE = ("Qwen3MoeForCausalLM", "qwen3_moe")
OLMOE = ("OlmoeForCausalLM", "olmoe")
GPT_OSS = ("GptOssForCausalLM", "gpt_oss")
GLM4_MOE = ("Glm4MoeForCausalLM", "glm4_moe")
MINIMAX_M2 = ("MiniMaxM2ForCausalLM", "minimax_m2")
LLAMA4 = ("Llama4ForCausalLM", "llama4_text")

CASES = (
    Case(name="llama", config=_v5(*LLAMA, hidden_act="silu", rope_parameters=_rope())),
    Case(
        name="llama-llama3-rope-tied",
        engine=True,
        config=_v5(
            *LLAMA,
            head_dim=16,
            tie_word_embeddings=True,
            rope_parameters=_rope(
                "llama3",
                500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    Case(
        name="llama-linear-rope-v4-mha",
        config=_v4(*LLAMA, num_key_value_heads=6, rope_theta=5000.0, rope_scaling={"type": "linear", "factor": 4.0}),
    ),
    Case(
        name="llama-yarn-mqa",
        config=_v5(
            *LLAMA,
            num_attention_heads=3,
            num_key_value_heads=1,
            rope_parameters=_rope(
                "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=2.0, beta_slow=0.25
            ),
        ),
    ),
    Case(
        name="llama-biases",
        config=_v5(*LLAMA, attention_bias=True, mlp_bias=True, hidden_act="gelu", rope_parameters=_rope()),
    ),
    Case(
        name="mistral",
        engine=True,
        config=_v5(*MISTRAL, head_dim=16, sliding_window=7, rope_parameters=_rope(theta=1e6)),
    ),
    Case(
        name="mistral-full-v4",
        config=_v4(*MISTRAL, head_dim=None, sliding_window=None, rope_theta=1e6, tie_word_embeddings=True),
    ),
    Case(
        name="qwen2-v4",
        config=_v4(
            *QWEN2,
            tie_word_embeddings=True,
            rope_theta=1e6,
            use_sliding_window=False,
            sliding_window=5,
            max_window_layers=1,
        ),
    ),
    Case(
        name="qwen2-sliding-v4",
        engine=True,
        config=_v4(*QWEN2, head_dim=12, rope_theta=1e4, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    ),
    Case(
        name="qwen3",
        config=_v5(
            *QWEN3,
            head_dim=16,
            rope_parameters=_rope(theta=1e6),
            use_sliding_window=False,
            sliding_window=None,
            layer_types=_sliding("fff"),
        ),
    ),
    Case(
        name="qwen3-sliding-yarn-biases",
        engine=True,
        config=_v5(
            *QWEN3,
            head_dim=12,
            num_key_value_heads=3,
            attention_bias=True,
            use_sliding_window=True,
            sliding_window=6,
            layer_types=_sliding("sfs"),
            rope_parameters=_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                mscale=1.2,
                mscale_all_dim=0.7,
                truncate=False,
            ),
        ),
    ),
    Case(
        name="gemma2",
        engine=True,
        config=_v5(
            *GEMMA2,
            head_dim=16,
            hidden_activation="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            query_pre_attn_scalar=9,
            sliding_window=5,
            layer_types=_sliding("sfs"),
            attn_logit_softcapping=3.0,
            final_logit_softcapping=6.0,
            rope_parameters=_rope(),
        ),
    ),
    Case(
        name="gemma2-uncapped-v4",
        config=_v4(
            *GEMMA2,
            head_dim=12,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            attention_bias=True,
            query_pre_attn_scalar=24,
            sliding_window=6,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            rope_theta=1000.0,
        ),
    ),
    Case(
        name="gemma3-v4",
        engine=True,
        config=_v4(
            *GEMMA3,
            head_dim=16,
            hidden_activation="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            query_pre_attn_scalar=8,
            sliding_window=6,
            sliding_window_pattern=2,
            rope_theta=1000.0,
            rope_local_base_freq=100.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
    ),
    Case(
        name="gemma3-layer-types",
        config=_v5(
            *GEMMA3,
            head_dim=12,
            num_attention_heads=3,
            num_key_value_heads=1,
            hidden_activation="gelu_pytorch_tanh",
            query_pre_attn_scalar=4,
            sliding_window=7,
            layer_types=_sliding("sfs"),
            final_logit_softcapping=7.0,
            rope_parameters={
                "full_attention": _rope("linear", 5000.0, factor=2.0),
                "sliding_attention": _rope(theta=50.0),
            },
        ),
    ),
    Case(
        name="gemma3-default-pattern",
        config=_v5(
            *GEMMA3,
            hidden_size=36,
            head_dim=8,
            num_hidden_layers=7,
            hidden_activation="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            query_pre_attn_scalar=8,
            sliding_window=5,
            attention_bias=True,
        ),
    ),
    Case(
        name="phi3-partial",
        config=_v5(*PHI3, head_dim=16, sliding_window=9, rope_parameters=_rope(partial_rotary_factor=0.5)),
    ),
    Case(
        name="phi3-longrope-short",
        config=_v5(
            *PHI3,
            num_attention_heads=4,
            max_position_embeddings=4096,
            original_max_position_embeddings=512,
            rope_parameters=_rope("longrope", short_factor=SHORT_FACTORS, long_factor=LONG_FACTORS),
        ),
    ),
    Case(
        name="phi3-longrope-long-v4",
        engine=True,
        config=_v4(
            *PHI3,
            num_attention_heads=3,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            max_position_embeddings=128,
            original_max_position_embeddings=16,
            partial_rotary_factor=0.75,
            rope_theta=1000.0,
            rope_scaling={"type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS},
        ),
        shortest_prompt=17,  # transformers picks the factors by the tokens so far, we by what the context may hold
    ),
    Case(
        name="phi3-4-mini-v4",
        config=_v4(
            *PHI3,
            num_attention_heads=3,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            original_max_position_embeddings=512,
            partial_rotary_factor=0.75,
            rope_theta=250.0,
            rope_scaling={"type": "longrope", "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS},
            sliding_window=262144,
        ),
    ),
    Case(
        name="smollm3",
        config=_v5(
            *SMOLLM3,
            num_hidden_layers=5,
            tie_word_embeddings=True,
            no_rope_layer_interval=4,
            rope_parameters=_rope(theta=2e6),
        ),
    ),
    Case(
        name="smollm3-sliding-v4",
        engine=True,
        config=_v4(
            *SMOLLM3,
            head_dim=12,
            attention_bias=True,
            mlp_bias=True,
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=8,
            rope_theta=5e4,
        ),
    ),
    Case(
        name="olmo2",
        engine=True,
        config=_v5(*OLMO2, head_dim=12, num_key_value_heads=3, rope_parameters=_rope(theta=5e5)),
    ),
    Case(
        name="olmo2-mha-biases-v4",
        config=_v4(*OLMO2, num_key_value_heads=6, attention_bias=True, rope_theta=1e4),
    ),
    Case(
        name="olmo3",
        config=_v5(
            *OLMO3,
            num_hidden_layers=5,
            sliding_window=6,
            rope_parameters={
                "full_attention": _rope(
                    "yarn", 5000.0, factor=4.0, original_max_position_embeddings=64, attention_factor=1.3
                ),
                "sliding_attention": _rope(theta=500.0),
            },
        ),
    ),
    Case(
        name="olmo3-v4",
        engine=True,
        config=_v4(
            *OLMO3,
            head_dim=12,
            num_key_value_heads=6,
            sliding_window=7,
            layer_types=_sliding("sfs"),
            rope_theta=5e5,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ),
    Case(
        name="cohere-v4",
        config=_v4(*COHERE, tie_word_embeddings=True, layer_norm_eps=1e-3, logit_scale=0.5, rope_theta=1000.0),
    ),
    Case(
        name="cohere-qk-norm",
        engine=True,
        config=_v5(
            *COHERE,
            head_dim=12,
            attention_bias=True,
            use_qk_norm=True,
            layer_norm_eps=1e-3,
            logit_scale=0.75,
            rope_parameters=_rope(theta=500.0),
        ),
    ),
    Case(
        name="cohere2",
        engine=True,
        config=_v5(
            *COHERE2,
            num_hidden_layers=5,
            tie_word_embeddings=True,
            layer_norm_eps=1e-3,
            logit_scale=0.5,
            sliding_window=6,
            layer_types=_sliding("sssfs"),
            rope_parameters=_rope(theta=500.0),
        ),
    ),
    Case(
        name="cohere2-biases-v4",
        config=_v4(
            *COHERE2,
            attention_bias=True,
            layer_norm_eps=1e-3,
            logit_scale=0.75,
            sliding_window=7,
            sliding_window_pattern=2,
            rope_theta=1000.0,
        ),
    ),
    Case(
        name="granite",
        engine=True,
        config=_v5(
            *GRANITE,
            head_dim=12,
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.7,
            logits_scaling=1.5,
            rope_parameters=_rope(),
        ),
    ),
    Case(
        name="granite-biases-tied-v4",
        config=_v4(
            *GRANITE,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            embedding_multiplier=12,
            attention_multiplier=0.5,
            residual_multiplier=0.4,
            logits_scaling=2,
            rope_theta=500.0,
        ),
    ),
    Case(
        name="exaone4",
        engine=True,
        config=_v5(
            *EXAONE4,
            num_hidden_layers=5,
            head_dim=12,
            sliding_window=6,
            sliding_window_pattern="LLLG",
            layer_types=_sliding("sssfs"),
            rope_parameters=_rope(
                "llama3",
                500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    Case(
        name="exaone4-pattern-v4",
        config=_v4(*EXAONE4, sliding_window=7, sliding_window_pattern=2, rope_theta=1000.0),
    ),
    Case(
        name="exaone4-full-v4",
        config=_v4(
            *EXAONE4,
            tie_word_embeddings=True,
            sliding_window=None,
            sliding_window_pattern=None,
            layer_types=_sliding("fff"),
            rope_theta=1000.0,
        ),
    ),
    Case(
        name="ministral3",
        engine=True,
        config=_v5(
            *MINISTRAL3,
            head_dim=12,
            rope_parameters=_rope(
                "yarn",
                1000.0,
                factor=16.0,
                original_max_position_embeddings=16,
                beta_fast=4.0,
                beta_slow=0.25,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.6,
            ),
        ),
    ),
    Case(
        name="ministral3-sliding",
        config=_v5(
            *MINISTRAL3,
            head_dim=16,
            tie_word_embeddings=True,
            sliding_window=9,
            rope_parameters=_rope(original_max_position_embeddings=8, llama_4_scaling_beta=0.3),
        ),
    ),
    Case(
        name="glm",
        engine=True,
        config=_v5(*GLM, head_dim=16, rope_parameters=_rope(theta=500.0, partial_rotary_factor=0.5)),
    ),
    Case(
        name="glm-v4",
        config=_v4(*GLM, head_dim=12, attention_bias=False, tie_word_embeddings=True, rope_theta=1000.0),
    ),
    Case(
        name="glm4",
        engine=True,
        config=_v5(*GLM4, head_dim=12, attention_bias=False, rope_parameters=_rope(partial_rotary_factor=0.5)),
    ),
    Case(
        name="glm4-biases-v4",
        config=_v4(*GLM4, head_dim=16, num_key_value_heads=3, partial_rotary_factor=0.25, rope_theta=500.0),
    ),
    Case(
        name="seed_oss",
        engine=True,
        config=_v5(*SEED_OSS, head_dim=12, attention_bias=True, rope_parameters=_rope(theta=1e7)),
    ),
    Case(
        name="seed_oss-biases-v4",
        config=_v4(
            *SEED_OSS,
            head_dim=16,
            attention_bias=False,
            attention_out_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_theta=1000.0,
        ),
    ),
    Case(
        name="phi",
        engine=True,
        config=_v5(
            *PHI,
            num_key_value_heads=3,
            hidden_act="gelu_new",
            layer_norm_eps=1e-3,
            rope_parameters=_rope(theta=500.0, partial_rotary_factor=0.5),
        ),
    ),
    Case(
        name="phi-v4",
        config=_v4(
            *PHI,
            num_attention_heads=3,
            num_key_value_heads=None,
            hidden_act="gelu_new",
            layer_norm_eps=1e-3,
            tie_word_embeddings=True,
            partial_rotary_factor=0.25,
            rope_theta=100.0,
        ),
    ),
    Case(
        name="gpt2",
        engine=True,
        config={
            **GPT2,
            **TRANSFORMERS_5,
            "n_inner": 68,
            "tie_word_embeddings": False,
            "scale_attn_by_inverse_layer_idx": True,
            "reorder_and_upcast_attn": True,
        },
    ),
    Case(
        name="gpt2-tied-v4",
        config={
            **GPT2,
            **TRANSFORMERS_4,
            "n_ctx": 256,
            "n_inner": None,
            "tie_word_embeddings": True,
            "activation_function": "gelu",
            "scale_attn_weights": False,
        },
    ),
    Case(
        name="opt",
        engine=True,
        config=_v5(*OPT, ffn_dim=68, tie_word_embeddings=True),
    ),
    Case(
        name="opt-post-norm-v4",
        config=_v4(
            *OPT,
            ffn_dim=68,
            word_embed_proj_dim=20,
            do_layer_norm_before=False,
            activation_function="gelu",
        ),
    ),
    Case(
        name="opt-no-biases-v4",
        config=_v4(*OPT, ffn_dim=68, word_embed_proj_dim=52, enable_bias=False, _remove_final_layer_norm=True),
    ),
    Case(
        name="gemma3-vision",
        config={
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            **TRANSFORMERS_5,
            "text_config": {
                **_v5(*GEMMA3, **GEMMA),
                "head_dim": 12,
                "query_pre_attn_scalar": 8,
                "sliding_window": 6,
                "layer_types": _sliding("sfs"),
                "rope_parameters": {
                    "full_attention": _rope("linear", 5000.0, factor=8.0),
                    "sliding_attention": _rope(theta=50.0),
                },
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 8,
                "intermediate_size": 12,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 1,
            "tie_word_embeddings": True,
            **{f"{name}_token_index": 200 for name in ("boi", "eoi", "image")},
        },
    ),
    Case(
        name="gemma3n",
        engine=True,
        config=_v5(
            *GEMMA3N,
            **GEMMA,
            num_hidden_layers=5,
            head_dim=12,
            sliding_window=6,
            layer_types=_sliding("sfssf"),
            num_kv_shared_layers=2,
            vocab_size_per_layer_input=90,
            hidden_size_per_layer_input=7,
            laurel_rank=5,
            altup_num_inputs=3,
            altup_active_idx=1,
            activation_sparsity_pattern=[0.5, 0.0, 0.75, 0.0, 0.5],
            intermediate_size=[68, 68, 52, 68, 60],
            final_logit_softcapping=9.0,
            rope_parameters={
                "full_attention": _rope(theta=500.0),
                "sliding_attention": _rope(theta=50.0),
            },
        ),
    ),
    Case(
        name="gemma3n-v4",
        config=_v4(
            *GEMMA3N,
            **GEMMA,
            num_hidden_layers=7,
            head_dim=16,
            sliding_window=7,
            num_kv_shared_layers=1,
            vocab_size_per_layer_input=97,
            hidden_size_per_layer_input=8,
            altup_correct_scale=False,
            rope_theta=1000.0,
            rope_local_base_freq=100.0,
        ),
    ),
    Case(
        name="gemma4",
        engine=True,
        config=_v5(
            *GEMMA4,
            **GEMMA,
            num_hidden_layers=5,
            head_dim=12,
            global_head_dim=20,
            sliding_window=6,
            layer_types=_sliding("sfssf"),
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
            vocab_size_per_layer_input=97,
            hidden_size_per_layer_input=7,
            final_logit_softcapping=9.0,
            rope_parameters={
                "full_attention": _rope("proportional", 500.0, partial_rotary_factor=0.5),
                "sliding_attention": _rope(theta=50.0),
            },
        ),
    ),
    Case(
        name="gemma4-values-are-keys",
        config=_v5(
            *GEMMA4,
            **GEMMA,
            num_hidden_layers=4,
            num_key_value_heads=3,
            head_dim=12,
            sliding_window=6,
            layer_types=_sliding("sfsf"),
            attention_k_eq_v=True,
            per_layer_config={
                "1": {"head_dim": 16, "num_key_value_heads": 2},
                "3": {"head_dim": 16, "num_key_value_heads": 2},
            },
            hidden_size_per_layer_input=0,
            use_bidirectional_attention="vision",
        ),
    ),
    Case(
        name="qwen3_next",
        engine=True,
        config=_v5(
            *QWEN3_NEXT,
            **DELTA_NET,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            head_dim=16,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=28,
            num_experts=7,
            num_experts_per_tok=3,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
            rope_parameters=_rope(theta=1e6, partial_rotary_factor=0.25),
        ),
    ),
    Case(
        name="qwen3_next-dense-v4",
        config=_v4(
            *QWEN3_NEXT,
            **DELTA_NET | {"linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_conv_kernel_dim": 3},
            num_hidden_layers=3,
            full_attention_interval=2,
            head_dim=12,
            attention_bias=True,
            num_experts=0,
            mlp_only_layers=[],
            tie_word_embeddings=True,
            partial_rotary_factor=0.5,
            rope_theta=1e4,
        ),
    ),
    Case(
        name="qwen3_5",
        engine=True,
        config=_v5(
            *QWEN3_5,
            **DELTA_NET,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            head_dim=16,
            rope_parameters=_rope(theta=1e6, partial_rotary_factor=0.25, mrope_section=[1, 1, 0]),
        ),
    ),
    Case(
        name="qwen3_5_moe",
        engine=True,
        config=_v5(
            *QWEN3_5_MOE,
            **DELTA_NET,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            head_dim=16,
            moe_intermediate_size=20,
            shared_expert_intermediate_size=28,
            num_experts=7,
            num_experts_per_tok=3,
            rope_parameters=_rope(theta=1e6, partial_rotary_factor=0.25, mrope_section=[1, 1, 0]),
        ),
    ),
    Case(
        name="falcon_h1",
        engine=True,
        config=_v5(
            *FALCON_H1,
            **MAMBA,
            head_dim=12,
            mamba_d_ssm=36,
            mamba_rms_norm=True,
            mamba_norm_before_gate=False,
            mamba_chunk_size=16,
            embedding_multiplier=1.7,
            lm_head_multiplier=0.8,
            mlp_multipliers=[0.9, 1.2],
            key_multiplier=0.7,
            attention_in_multiplier=1.2,
            attention_out_multiplier=0.8,
            ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 0.7],
            ssm_in_multiplier=1.1,
            ssm_out_multiplier=0.9,
            rope_parameters=_rope(theta=1e6),
        ),
    ),
    Case(
        name="falcon_h1-biases-v4",
        config=_v4(
            *FALCON_H1,
            **MAMBA | {"mamba_n_heads": 4, "mamba_n_groups": 1},
            mamba_d_ssm=None,
            mamba_expand=1,
            mamba_rms_norm=False,
            mamba_proj_bias=True,
            projectors_bias=True,
            attention_bias=True,
            mlp_bias=True,
            mamba_conv_bias=False,
            tie_word_embeddings=True,
            rope_theta=1e4,
        ),
    ),
    Case(
        name="granite_hybrid",
        engine=True,
        config=_v5(
            *GRANITE_HYBRID,
            **MAMBA,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            mamba_expand=1,
            mamba_chunk_size=16,
            shared_intermediate_size=36,
            num_local_experts=7,
            num_experts_per_tok=3,
            intermediate_size=20,
            position_embedding_type=None,
            embedding_multiplier=1.5,
            attention_multiplier=0.3,
            residual_multiplier=0.7,
            logits_scaling=0.8,
        ),
    ),
    Case(
        name="granite_hybrid-dense-v4",
        config=_v4(
            *GRANITE_HYBRID,
            **MAMBA | {"mamba_n_groups": 1},
            layer_types=["mamba", "mamba", "attention"],
            mamba_expand=2,
            mamba_proj_bias=True,
            shared_intermediate_size=36,
            num_local_experts=0,
            num_experts_per_tok=0,
            attention_bias=True,
            attention_multiplier=0.3,
            position_embedding_type="rope",
            rope_theta=1e4,
            tie_word_embeddings=True,
        ),
    ),
    Case(
        name="nemotron_h",
        engine=True,
        config=_v5(
            *NEMOTRON_H,
            layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
            num_hidden_layers=5,
            head_dim=12,
            mamba_num_heads=6,
            mamba_head_dim=7,
            n_groups=2,
            ssm_state_size=10,
            conv_kernel=4,
            chunk_size=16,
            layer_norm_epsilon=1e-3,
        ),
    ),
    Case(
        name="nemotron_h-biases-v4",
        config=_v4(
            *NEMOTRON_H,
            hybrid_override_pattern="M-*M",
            num_hidden_layers=4,
            head_dim=16,
            mamba_num_heads=4,
            mamba_head_dim=9,
            n_groups=1,
            ssm_state_size=6,
            conv_kernel=3,
            use_bias=True,
            use_conv_bias=False,
            mlp_bias=True,
            layer_norm_epsilon=1e-3,
        ),
    ),
    Case(
        name="nemotron_h-experts",
        engine=True,
        config=_v5(
            *NEMOTRON_H,
            layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
            num_hidden_layers=4,
            head_dim=12,
            mamba_num_heads=6,
            mamba_head_dim=7,
            n_groups=2,
            ssm_state_size=10,
            conv_kernel=4,
            chunk_size=16,
            layer_norm_epsilon=1e-3,
            n_routed_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=20,
            moe_shared_expert_intermediate_size=28,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
        ),
    ),
    Case(
        name="nemotron_h-narrowed-experts-v4",
        config=_v4(
            *NEMOTRON_H,
            hybrid_override_pattern="EM*E-",
            num_hidden_layers=5,
            head_dim=12,
            mamba_num_heads=4,
            mamba_head_dim=9,
            n_groups=2,
            ssm_state_size=6,
            conv_kernel=4,
            mlp_bias=True,
            layer_norm_epsilon=1e-3,
            n_routed_experts=7,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            moe_intermediate_size=20,
            moe_latent_size=28,
            moe_shared_expert_intermediate_size=36,
        ),
    ),
    Case(
        name="deepseek_v2",
        engine=True,
        config=_v5(
            *DEEPSEEK_V2,
            **LATENT,
            q_lora_rank=None,
            moe_intermediate_size=20,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            routed_scaling_factor=2.0,
            first_k_dense_replace=1,
            rope_parameters=_rope(theta=1e4),
        ),
    ),
    Case(
        name="deepseek_v2-yarn-v4",
        config=_v4(
            *DEEPSEEK_V2,
            **LATENT,
            q_lora_rank=18,
            attention_bias=True,
            moe_intermediate_size=12,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=1,
            topk_method="greedy",
            first_k_dense_replace=2,
            rope_theta=1e4,
            rope_scaling={
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
            },
        ),
    ),
    Case(
        name="deepseek_v3",
        engine=True,
        config=_v5(
            *DEEPSEEK_V3,
            **LATENT,
            q_lora_rank=18,
            moe_intermediate_size=20,
            n_routed_experts=12,
            num_experts_per_tok=3,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
            norm_topk_prob=True,
            first_k_dense_replace=1,
            num_nextn_predict_layers=0,
            rope_parameters=_rope(
                "yarn", 1e4, factor=4.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0
            ),
        ),
    ),
    Case(
        name="deepseek_v3-halves-v4",
        config=_v4(
            *DEEPSEEK_V3,
            **LATENT,
            q_lora_rank=None,
            attention_bias=True,
            moe_intermediate_size=12,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            first_k_dense_replace=2,
            rope_interleave=False,
            num_nextn_predict_layers=0,
            rope_theta=1e4,
        ),
    ),
    Case(
        name="deepseek_v3-kimi-v4",  # Kimi K2: one group of experts, yarn with one wavelength
        config=_v4(
            *DEEPSEEK_V3,
            **LATENT,
            q_lora_rank=18,
            moe_intermediate_size=12,
            moe_layer_freq=1,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.827,
            first_k_dense_replace=1,
            num_nextn_predict_layers=0,
            rope_theta=5e4,
            rope_scaling={
                "type": "yarn",
                "beta_fast": 1.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16,
            },
        ),
    ),
    Case(
        name="mixtral",
        engine=True,
        config=_v5(
            *MIXTRAL,
            intermediate_size=20,
            head_dim=12,
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=None,
            rope_parameters=_rope(theta=1e6),
        ),
    ),
    Case(
        name="mixtral-sliding-v4",
        config=_v4(
            *MIXTRAL,
            intermediate_size=20,
            num_local_experts=5,
            num_experts_per_tok=3,
            sliding_window=7,
            rope_theta=1e4,
            router_jitter_noise=0.0,
            tie_word_embeddings=True,
        ),
    ),
    Case(
        name="qwen3_moe",
        engine=True,
        config=_v5(
            *QWEN3_MOE,
            num_hidden_layers=4,
            head_dim=16,
            moe_intermediate_size=20,
            num_experts=9,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[0],
            rope_parameters=_rope(theta=1e6),
        ),
    ),
    Case(
        name="qwen3_moe-sparse-step-v4",
        config=_v4(
            *QWEN3_MOE,
            num_hidden_layers=5,
            head_dim=12,
            attention_bias=True,
            moe_intermediate_size=12,
            num_experts=7,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            mlp_only_layers=[],
            use_sliding_window=True,
            sliding_window=6,
            rope_theta=1e4,
        ),
    ),
    Case(
        name="qwen2_moe-v4",
        config=_v4(
            *QWEN2_MOE,
            num_key_value_heads=6,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=28,
            num_experts=7,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            decoder_sparse_step=1,
            mlp_only_layers=[1],
            use_sliding_window=False,
            sliding_window=6,
            max_window_layers=2,
            rope_theta=1e6,
        ),
    ),
    Case(
        name="qwen2_moe-sliding",
        engine=True,
        config=_v5(
            *QWEN2_MOE,
            head_dim=12,
            qkv_bias=False,
            moe_intermediate_size=12,
            shared_expert_intermediate_size=20,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            use_sliding_window=True,
            sliding_window=6,
            max_window_layers=2,
            rope_parameters=_rope(theta=1e4),
        ),
    ),
    Case(
        name="olmoe",
        engine=True,
        config=_v5(
            *OLMOE,
            intermediate_size=20,
            num_key_value_heads=3,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=False,
            rope_parameters=_rope(theta=1e4),
        ),
    ),
    Case(
        name="gpt_oss",
        engine=True,
        config=_v5(
            *GPT_OSS,
            intermediate_size=20,
            head_dim=16,
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=6,
            layer_types=_sliding("sfs"),
            swiglu_limit=1.5,
            rope_parameters=_rope(
                "yarn",
                150_000.0,
                factor=4.0,
                original_max_position_embeddings=64,
                beta_fast=2.0,
                beta_slow=0.25,
                truncate=False,
            ),
        ),
    ),
    Case(
        name="olmoe-clipped-v4",
        config=_v4(
            *OLMOE,
            intermediate_size=12,
            num_key_value_heads=6,
            num_experts=5,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            attention_bias=True,
            clip_qkv=1.5,
            rope_theta=1e4,
        ),
    ),
    Case(
        name="glm4_moe",
        engine=True,
        config=_v5(
            *GLM4_MOE,
            num_hidden_layers=4,
            head_dim=16,
            moe_intermediate_size=12,
            n_routed_experts=12,
            num_experts_per_tok=3,
            n_shared_experts=2,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
            norm_topk_prob=True,
            first_k_dense_replace=1,
            use_qk_norm=True,
            num_nextn_predict_layers=1,
            rope_parameters=_rope(theta=1e4, partial_rotary_factor=0.5),
        ),
    ),
    Case(
        name="minimax_m2",
        engine=True,
        config=_v5(
            *MINIMAX_M2,
            intermediate_size=20,
            head_dim=16,
            num_local_experts=7,
            num_experts_per_tok=3,
            rope_parameters=_rope(theta=5e6, partial_rotary_factor=0.5),
        ),
    ),
    Case(
        name="llama4",
        engine=True,
        config=_v5(
            *LLAMA4,
            num_hidden_layers=5,
            head_dim=16,
            intermediate_size=20,
            intermediate_size_mlp=28,
            num_local_experts=4,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=24,
            use_qk_norm=True,
            floor_scale=9,
            attn_scale=0.4,
            rope_parameters=_rope(
                "llama3",
                500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
    ),
)

# A_log, Δ's bias (so that states last for some tokens), Mamba's D and short convolutions: center and scale.
RECURRENT_WEIGHTS = {
    ".A_log": (0.0, 0.5),
    ".dt_bias": (-2.0, 0.5),
    ".D": (1.0, 0.3),
    ".conv1d.weight": (0.0, 0.5),
}

LAST_NORMS = (
    "model.norm.weight",
    "model.language_model.norm.weight",
    "model.final_layernorm.weight",
    "model.decoder.final_layer_norm.weight",
    "transformer.ln_f.weight",
    "backbone.norm_f.weight",
)
EMBEDDINGS = (
    "embed_tokens.weight",
    "embeddings.weight",
    "embed_tokens_per_layer.weight",
    "embed_positions.weight",
    "wte.weight",
    "wpe.weight",
)
UNSCALED = ("gemma3n_text", "gemma4_text")  # scores are as large as norms make them
# 1 is added to the scales of their norms.
ZERO_CENTERED = (
    *("gemma2", "gemma3", "gemma3_text", "qwen3_next"),
    *("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
)


def make_weight(name: str, shape: tuple[int, ...], config: Mapping[str, Any], seed: int) -> np.ndarray:
    """The float32 tensor of this name.

    Scales are a compromise: large enough for varied texts and clear choices, small enough not to amplify rounding.
    The last norm's weights are of either sign and tied embeddings small, or models would repeat their input.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    center, scale = 0.0, 0.2  # biases
    of_recurrence = next((suffix for suffix in RECURRENT_WEIGHTS if name.endswith(suffix)), None)
    if of_recurrence:
        center, scale = RECURRENT_WEIGHTS[of_recurrence]
    elif name in LAST_NORMS:
        scale = 3.5
    elif name.endswith("q_norm.weight") and config["model_type"] in UNSCALED:
        center, scale = 0.2, 0.1
    elif name.endswith("layer_scalar"):
        center = 0.8
    elif name.endswith(".sinks"):
        scale = 2.0
    elif name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight")):
        zero_centered = config["model_type"] in ZERO_CENTERED and "linear_attn" not in name
        center, scale = (0.0 if zero_centered else 1.0), 0.4
    elif name.endswith(EMBEDDINGS):
        scale = 0.1 if config["tie_word_embeddings"] else 0.4
    elif len(shape) >= 2:
        scale = 1.0
        if name == "lm_head.weight":
            scale = 0.7
        elif any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "c_attn")):
            scale = 1.3  # attention that chooses
        elif "project_out" in name:
            scale = 3.5  # as the last norm, which may be missing
        # Of inputs: of rows where a tensor holds all experts, [E, D, N], as of columns elsewhere, but for GPT-2.
        scale /= math.sqrt(shape[0 if config["model_type"] == "gpt2" and name != "lm_head.weight" else 1])
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale) + np.float32(center)


def make_prompts(case: Case, seed: int) -> list[list[int]]:
    """Ragged prompts, from the shortest allowed to the longest."""
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode())])
    lengths = rng.integers(case.shortest_prompt, LONGEST_PROMPT, NUM_PROMPTS, endpoint=True)
    lengths[:2] = case.shortest_prompt, LONGEST_PROMPT
    return [rng.integers(0, case.vocab_size, n).tolist() for n in lengths]
