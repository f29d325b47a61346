"""Models and meshes that training is tried on."""

from dataclasses import dataclass

from tenfold.train.parallelism import Parallelism

VOCAB = 48

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
MODELS = {
    "llama": LLAMA,
    "mixtral": LLAMA
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_hidden_layers": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@dataclass(frozen=True)
class Case:
    """A model, and how it is trained."""

    model: str
    parallelism: Parallelism

    def __str__(self) -> str:
        return f"{self.model}-{self.parallelism.mesh}-{self.parallelism.schedule}"
