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
    "c4ai-command-r7b": _sizes("cohere2", 256000, 4096, 14336, 32, 32, 8, context=132096, tied=True),
    "granite-3.3-8b": _sizes("granite", 49159, 4096, 12800, 40, 32, 8, context=131072, tied=True),
    "EXAONE-4.0-32B": _sizes("exaone4", 102400, 5120, 27392, 64, 40, 8, context=131072),
    "GLM-4-9B-0414": _sizes("glm4", 151552, 4096, 13696, 40, 32, 2, context=32768, attention_bias=True),
    "Seed-OSS-36B": _sizes("seed_oss", 155136, 5120, 27648, 64, 80, 8, context=524288, head_dim=128),
    "gemma-3n-E4B (text)": _sizes(
        "gemma3n_text",
        262400,
        2048,
        16384,
        35,
        8,
        2,
        context=32768,
        tied=True,
        head_dim=256,
        vocab_size_per_layer_input=262144,
        hidden_size_per_layer_input=256,
    ),
    "Olmo-3-1025-7B": _sizes("olmo3", 100278, 4096, 11008, 32, 32, 32, context=65536),
}
