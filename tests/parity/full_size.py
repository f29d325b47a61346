"""Published models: what their config.json says about sizes, for counting weights without any memory."""

from typing import Any


def _sizes(
    model_type: str, V: int, D: int, F: int, L: int, H: int, J: int, *, context: int, tied: bool = False, **own: Any
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": L,
        "num_attention_heads": H,
        "num_key_value_heads": J,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
        **own,
    }


FULL_SIZE = {
    "Llama-2-7b": _sizes("llama", 32000, 4096, 11008, 32, 32, 32, context=4096),
    "Llama-3.1-8B": _sizes("llama", 128256, 4096, 14336, 32, 32, 8, context=131072),
    "Llama-3.1-70B": _sizes("llama", 128256, 8192, 28672, 80, 64, 8, context=131072),
    "Llama-3.1-405B": _sizes("llama", 128256, 16384, 53248, 126, 128, 8, context=131072),
    "Llama-3.2-1B": _sizes("llama", 128256, 2048, 8192, 16, 32, 8, context=131072, tied=True, head_dim=64),
    "Mistral-7B-v0.3": _sizes("mistral", 32768, 4096, 14336, 32, 32, 8, context=32768, sliding_window=None),
    "Mistral-Nemo-2407": _sizes(
        "mistral", 131072, 5120, 14336, 40, 32, 8, context=131072, head_dim=128, sliding_window=None
    ),
    "Qwen2.5-0.5B": _sizes("qwen2", 151936, 896, 4864, 24, 14, 2, context=32768, tied=True),
    "Qwen2.5-7B": _sizes("qwen2", 152064, 3584, 18944, 28, 28, 4, context=131072),
    "Qwen3-0.6B": _sizes("qwen3", 151936, 1024, 3072, 28, 16, 8, context=40960, tied=True, head_dim=128),
    "Qwen3-8B": _sizes("qwen3", 151936, 4096, 12288, 36, 32, 8, context=40960, head_dim=128),
    "gemma-2-2b": _sizes("gemma2", 256000, 2304, 9216, 26, 8, 4, context=8192, tied=True, head_dim=256),
    "gemma-2-9b": _sizes("gemma2", 256000, 3584, 14336, 42, 16, 8, context=8192, tied=True, head_dim=256),
    "gemma-3-1b": _sizes("gemma3_text", 262144, 1152, 6912, 26, 4, 1, context=32768, tied=True, head_dim=256),
    "gemma-3-27b (text)": _sizes(
        "gemma3_text", 262208, 5376, 21504, 62, 32, 16, context=131072, tied=True, head_dim=128
    ),
    "Phi-3.5-mini": _sizes("phi3", 32064, 3072, 8192, 32, 32, 32, context=131072),
    "Phi-4-mini": _sizes("phi3", 200064, 3072, 8192, 32, 24, 8, context=131072, tied=True),
    "SmolLM3-3B": _sizes("smollm3", 128256, 2048, 11008, 36, 16, 4, context=65536, tied=True),
    "OLMo-2-1124-7B": _sizes("olmo2", 100352, 4096, 11008, 32, 32, 32, context=4096),
    "OLMo-2-0325-32B": _sizes("olmo2", 100352, 5120, 27648, 64, 40, 8, context=4096),
    "DeepSeek-V3": _sizes(
        "deepseek_v3",
        129280,
        7168,
        18432,
        61,
        128,
        128,
        context=163840,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_shared_experts=1,
        first_k_dense_replace=3,
    ),
    "Qwen3-Next-80B-A3B": _sizes(
        "qwen3_next",
        151936,
        2048,
        5120,
        48,
        16,
        2,
        context=262144,
        head_dim=256,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_experts=512,
        num_experts_per_tok=10,
    ),
    "Olmo-3-1025-7B": _sizes("olmo3", 100278, 4096, 11008, 32, 32, 32, context=65536),
    "Mixtral-8x7B-v0.1": _sizes("mixtral", 32000, 4096, 14336, 32, 32, 8, context=32768, num_local_experts=8),
    "Qwen3-30B-A3B": _sizes(
        "qwen3_moe",
        151936,
        2048,
        6144,
        48,
        32,
        4,
        context=40960,
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
    ),
    "Qwen3-235B-A22B": _sizes(
        "qwen3_moe",
        151936,
        4096,
        12288,
        94,
        64,
        4,
        context=40960,
        head_dim=128,
        moe_intermediate_size=1536,
        num_experts=128,
    ),
    "OLMoE-1B-7B-0924": _sizes("olmoe", 50304, 2048, 1024, 16, 16, 16, context=4096, num_experts=64),
    "gpt-oss-120b": _sizes(
        "gpt_oss", 201088, 2880, 2880, 36, 64, 8, context=131072, head_dim=64, num_local_experts=128
    ),
}
