"""Tiny random models, and what a request gives when it is computed the slow way: the whole sequence for every token."""

import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tenfold.engine.sampling_params import SamplingParams
from tenfold.models.family import Model, resolve
from tenfold.nn.packed import packed_attend
from tenfold.nn.param import Param, Tree, map_params

VOCABULARY = 97
EOS = (3, 11, 19, 64)  # so many that some outputs end early
MAX_LEN = 64

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": MAX_LEN,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "full": _SIZES
    | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_act": "silu"},
    "alternating": _SIZES
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "sliding_window": 13,
        "query_pre_attn_scalar": 8,
    },
    "sharing": _SIZES
    | {
        "architectures": ["Gemma4ForCausalLM"],
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "global_head_dim": 12,
        "sliding_window": 13,
        "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full")],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
    },
    "recurrent": _SIZES
    | {
        "architectures": ["Qwen3NextForCausalLM"],
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "num_key_value_heads": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 9,  # with 6 and 8, drawn weights magnify what is rounded at one position 140 times
        "linear_value_head_dim": 7,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
        "hidden_act": "silu",
    },
    "mamba": _SIZES
    | {
        "architectures": ["NemotronHForCausalLM"],
        "layers_block_type": ["mamba", "attention", "mlp"],
        "num_key_value_heads": 2,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 8,
        "conv_kernel": 4,
    },
    "latent": _SIZES
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "moe_intermediate_size": 24,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 3,
        "topk_group": 2,
    },
    "sliding": _SIZES
    | {
        "architectures": ["MistralForCausalLM"],
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "sliding_window": 12,
        "hidden_act": "silu",
    },
    "chunked": _SIZES
    | {
        "architectures": ["Llama4ForCausalLM"],
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "intermediate_size_mlp": 48,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 20,
        "floor_scale": 16,
    },
}


class TinyModel:
    """A model with weights, and its logits computed without a cache."""

    def __init__(self, model: Model, params: Tree) -> None:
        self.model, self.params = model, params
        self._forward = jax.jit(self._all_logits)
        self.logits([0])  # compiles now rather than while an engine counts compilations

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """[len(tokens), V] float64: what the model says after each token."""
        padded = np.zeros(self.model.config.max_len, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._forward(self.params, padded), np.float64)[: len(tokens)]

    def _all_logits(self, params: Tree, tokens: jax.Array) -> jax.Array:
        attend = packed_attend(jnp.zeros((1, tokens.shape[0]), jnp.int32))
        hidden, _ = self.model.forward(params, tokens, jnp.arange(tokens.shape[0]), attend)
        return self.model.logits(params, hidden)


@cache
def tiny_model(name: str) -> TinyModel:
    """The model of that name in `CONFIGS`, made once."""
    model = resolve(CONFIGS[name])
    return TinyModel(model, map_params(_draw, model.params()))


def _draw(p: Param) -> jax.Array:
    random = np.random.default_rng(zlib.crc32(p.sources[0].name.encode()))
    if p.init == "normal":
        return jax.device_put(random.normal(scale=0.3, size=p.shape).astype(np.float32))
    mean = 1.0 if p.init == "ones" else 0.0
    return jax.device_put(random.normal(mean, 0.1, size=p.shape).astype(np.float32))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dim, from the definition."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def adjust(logits: np.ndarray, tokens: Sequence[int], prompt_length: int, p: SamplingParams) -> np.ndarray:
    """The logits [V] of the token after `tokens`, with the request's bias and penalties (vLLM's definitions)."""
    logits = logits.copy()
    for token, bias in p.logit_bias.items():
        logits[token] += bias
    if len(tokens) - prompt_length < p.min_tokens:
        logits[[*p.stop_token_ids, *(() if p.ignore_eos else EOS)]] = -np.inf
    output = np.bincount(tokens[prompt_length:], minlength=VOCABULARY)
    seen = np.bincount(tokens, minlength=VOCABULARY) > 0
    repeated = np.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
    logits = np.where(seen, repeated, logits)
    return logits - p.frequency_penalty * output - p.presence_penalty * (output > 0)


def greedy(tiny: TinyModel, prompt: Sequence[int], p: SamplingParams, longest: int = MAX_LEN) -> list[int]:
    """The output tokens of a greedy request, one whole forward pass for each; with the prompt at most `longest`."""
    tokens = list(prompt)
    room = longest - len(prompt)
    for n in range(1, min(p.max_tokens or room, room) + 1):
        tokens.append(int(adjust(tiny.logits(tokens)[-1], tokens, len(prompt), p).argmax()))
        ends = tokens[-1] in p.stop_token_ids or (tokens[-1] in EOS and not p.ignore_eos)
        if ends and n >= p.min_tokens:
            break
    return tokens[len(prompt) :]
