"""GGUF's names for models and tensors, and Hugging Face's for the same.

A GGUF file describes a model with metadata of its own (`llama.attention.head_count`) and names tensors its own way
(`blk.3.attn_q.weight`). Two kinds of tensors also hold other numbers: where ggml rotates neighbouring dims, the rows of
q and k are interleaved, and Gemma's norms have the one added that transformers adds when it runs. Source:
https://github.com/ggml-org/llama.cpp, gguf-py/gguf/constants.py and the scripts in conversion/.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int

from tenfold.base.errors import CheckpointError, UnsupportedModelError
from tenfold.base.gguf import GGUFFile
from tenfold.base.gguf_keys import Keys

ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG = "rope_factors_long.weight"
ROPE_SHORT = "rope_factors_short.weight"
COMPUTED = (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
"""Tensors that are part of the configuration instead of weights."""


@dataclass(frozen=True)
class Naming:
    """How files of one architecture name and store tensors.

    Attributes:
        architecture, model_type: in Hugging Face's `config.json`.
        layer: Hugging Face's names within a layer by GGUF's, without ".weight"; one that ends in "_" takes "bias"
            without a dot and no "weight", and one with "{}" stands for the tensors of all experts, which a file has in
            one.
        interleaved: the rows of q and k are interleaved.
        norm_offset: what is added to the weights of norms.
        activation: of the feed-forward, which files do not say, by its key in `config.json`.
        latent: attention is to latents, so that sizes of heads are said in other words.
        others: further architectures that files have under the same name.
    """

    architecture: str
    model_type: str
    layer: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0
    activation: tuple[str, str] = ("hidden_act", "silu")
    latent: bool = False
    others: tuple[str, ...] = ()


_KEYS, _VALUES = "attn_k_b", "attn_v_b"
_GATES, _UPS = "ffn_gate_exps", "ffn_up_exps"
_W = {"gate": "w1", "up": "w3", "down": "w2"}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OUT = {"attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
_ATTENTION = {
    "attn_output": "self_attn.o_proj",
    **{f"attn_{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v")},
}
_PARTS = _OUT | {
    **_ATTENTION,
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up")},
}
_FUSED = _OUT | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_AROUND = _AFTER | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
_QK = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    **{f"ffn_{name}_exps": f"block_sparse_moe.experts.{{}}.{w}" for name, w in _W.items()},
}
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    **{f"ffn_{name}_exps": f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down")},
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{name}_shexp": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")},
}
_SHARED_EXPERTS = {
    "exp_probs_b": "mlp.gate.e_score_correction_",
    **{f"ffn_{name}_shexp": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")},
}
_LATENT = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    _KEYS: "self_attn.kv_b_proj",  # newer files have its halves apart
}
_FUSED_EXPERTS = {
    "attn_sinks": "self_attn.sinks_",
    "post_attention_norm": "post_attention_layernorm",
    "attn_norm": "input_layernorm",
    "ffn_gate_inp": "mlp.router",
    _GATES: "mlp.experts.gate_up_proj_",
    "ffn_down_exps": "mlp.experts.down_proj_",
}
_GELU = ("hidden_activation", "gelu_pytorch_tanh")

NAMINGS = {
    "llama": Naming(
        "LlamaForCausalLM",
        "llama",
        _PARTS | _BEFORE | _MIXTRAL,
        interleaved=True,
        others=("MistralForCausalLM", "MixtralForCausalLM"),
    ),
    "qwen2": Naming("Qwen2ForCausalLM", "qwen2", _PARTS | _BEFORE),
    "qwen3": Naming("Qwen3ForCausalLM", "qwen3", _PARTS | _BEFORE | _QK),
    "qwen2moe": Naming("Qwen2MoeForCausalLM", "qwen2_moe", _ATTENTION | _BEFORE | _EXPERTS | _SHARED_EXPERT),
    "qwen3moe": Naming("Qwen3MoeForCausalLM", "qwen3_moe", _ATTENTION | _BEFORE | _QK | _EXPERTS),
    "olmoe": Naming("OlmoeForCausalLM", "olmoe", _ATTENTION | _BEFORE | _QK | _EXPERTS),
    "deepseek2": Naming(
        *("DeepseekV2ForCausalLM", "deepseek_v2"),
        _PARTS | _BEFORE | _LATENT | _EXPERTS | _SHARED_EXPERTS,
        latent=True,
        others=("DeepseekV3ForCausalLM",),
    ),
    "gpt-oss": Naming("GptOssForCausalLM", "gpt_oss", _ATTENTION | _FUSED_EXPERTS),
    "gemma2": Naming("Gemma2ForCausalLM", "gemma2", _PARTS | _AROUND, norm_offset=1.0, activation=_GELU),
    "gemma3": Naming("Gemma3ForCausalLM", "gemma3_text", _PARTS | _AROUND | _QK, norm_offset=1.0, activation=_GELU),
    "phi3": Naming("Phi3ForCausalLM", "phi3", _FUSED | _BEFORE),
    "smollm3": Naming("SmolLM3ForCausalLM", "smollm3", _PARTS | _BEFORE, interleaved=True),
    "olmo2": Naming("Olmo2ForCausalLM", "olmo2", _PARTS | _AFTER | _QK, others=("Olmo3ForCausalLM",)),
}
"""By `general.architecture`."""


def naming(file: GGUFFile) -> Naming:
    """The naming of a file's architecture.

    Raises:
        CheckpointError: if the file does not say what it is.
        UnsupportedModelError: if the architecture is not known.
    """
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{file.path} has no general.architecture: it is not a model")
    if architecture not in NAMINGS:
        raise UnsupportedModelError(
            f"{file.path} has the architecture {architecture!r:.80}, which Tenfold does not read from GGUF; it reads "
            f"{', '.join(NAMINGS)}"
        )
    return NAMINGS[architecture]


# --- tensors --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSource:
    """Where a file has one of a checkpoint's tensors, and how it has it.

    Attributes:
        name: in the file.
        heads: if not None, the rows are those of so many heads, interleaved within each.
        offset: what the file's values are larger by.
        expert: if not None, which of the matrices that the file's tensor holds.
        values: if not None, the tensor with each head's rows for values [H, V, R], in which case `name` is that with
            its rows for keys as columns [H, R, K], and the checkpoint's tensor is [H · (K + V), R].
        ups: if not None, the tensor of whose rows one follows each of `name`.
        turned: the file has experts as [E, N, D], the checkpoint as [E, D, N].
    """

    name: str
    heads: int | None = None
    offset: float = 0.0
    expert: int | None = None
    values: str | None = None
    ups: str | None = None
    turned: bool = False

    def rows(self, count: int) -> Int[np.ndarray, " count"] | None:
        """For each of the checkpoint's rows the row of the file, or None where they are the same.

        The order of rows changes nothing within them, so that this also selects rows of blocks, codes and scales.

        Raises:
            CheckpointError: if the rows are not those of whole heads with pairs of dims.
        """
        return None if self.heads is None else deinterleaved(count, self.heads)


def deinterleaved(rows: int, heads: int) -> Int[np.ndarray, " rows"]:
    """For each row of a checkpoint's q or k the row of a GGUF file: each head's even rows, then its odd ones."""
    return _paired(rows, heads).swapaxes(1, 2).reshape(rows)


def interleaved(rows: int, heads: int) -> Int[np.ndarray, " rows"]:
    """The inverse: for each row of a GGUF file's q or k the row of a checkpoint."""
    order = np.empty(rows, np.intp)
    order[deinterleaved(rows, heads)] = np.arange(rows)
    return order


def _paired(rows: int, heads: int) -> np.ndarray:
    if rows % (2 * heads):
        raise CheckpointError(
            f"the GGUF file has q or k with {rows} rows, which are not pairs for each of {heads} heads"
        )
    return np.arange(rows).reshape(heads, rows // heads // 2, 2)


def to_hf_name(naming: Naming, name: str) -> str | None:
    """Hugging Face's name of a file's tensor, with "{}" where it has a tensor for each expert; None for those that are
    no weights, or only part of one that another name stands for.

    Raises:
        UnsupportedModelError: for a tensor that the architecture does not have.
    """
    if name in COMPUTED:
        return None
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)", stem)
    if kind in ("weight", "bias"):
        if stem in _TOP:
            return f"{_TOP[stem]}.{kind}"
        if layer is not None and layer[2] in naming.layer:
            return f"model.layers.{layer[1]}.{_join(naming.layer[layer[2]], kind)}"
        if layer is not None and {_VALUES: _KEYS, _UPS: _GATES}.get(layer[2]) in naming.layer:
            return None
    raise UnsupportedModelError(
        f"the GGUF file has the tensor {name!r}, which Tenfold does not know of {naming.architecture}"
    )


def _join(stem: str, kind: str) -> str:
    if stem.endswith("_"):
        return stem.removesuffix("_") if kind == "weight" else f"{stem}{kind}"
    return f"{stem}.{kind}"


def to_gguf_name(naming: Naming, name: str) -> str:
    """A file's name of a checkpoint's tensor; of an expert's, that of all experts'.

    Raises:
        UnsupportedModelError: for a tensor that the architecture does not have.
    """
    stem, _, kind = name.rpartition(".")
    for short, long in _TOP.items():
        if stem == long:
            return f"{short}.{kind}"
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", re.sub(r"\.experts\.\d+\.", ".experts.{}.", name))
    for short, long in naming.layer.items():
        for kind in ("weight", "bias"):
            if layer is not None and layer[2] == _join(long, kind):
                return f"blk.{layer[1]}.{short}.{kind}"
    raise UnsupportedModelError(f"GGUF has no name for the tensor {name!r} of {naming.architecture}")


def map_tensors(file: GGUFFile) -> dict[str, TensorSource]:
    """Where a file has the weights of a checkpoint, by Hugging Face's names.

    Raises:
        CheckpointError: if the file's metadata lack what this needs.
        UnsupportedModelError: for an unknown architecture or tensor; names it.
    """
    known, keys = naming(file), Keys(file)
    heads = {"attn_q": keys.count("attention.head_count"), "attn_k": kv_heads(keys)}
    found: dict[str, TensorSource] = {}
    for name in file:
        hf_name = to_hf_name(known, name)
        if hf_name is None:
            continue
        part = name.split(".")[-2]
        fused = part.endswith("_exps") and "{}" not in hf_name
        source = TensorSource(
            name,
            heads=heads.get(part) if known.interleaved else None,
            offset=known.norm_offset if part.endswith("norm") else 0.0,
            values=name.replace(_KEYS, _VALUES) if part == _KEYS else None,
            ups=name.replace(_GATES, _UPS) if fused and part == _GATES else None,
            turned=fused and name.endswith("weight"),
        )
        if "{}" in hf_name:
            count, *one = file.infos[name].shape
            experts = range(count if len(one) == 2 else 0)
            found |= {hf_name.format(expert): replace(source, expert=expert) for expert in experts}
        else:
            found[hf_name] = source
    return found


def kv_heads(keys: Keys) -> int:
    """As many as there are query heads, where the file does not say."""
    return keys.count("attention.head_count_kv", keys.count("attention.head_count"))
