"""Writing quantised weights as compressed-tensors' `pack-quantized`, which transformers and others read, too.

Format: https://github.com/vllm-project/compressed-tensors (`compressors/pack_quantized`); its reader here is
`tenfold.nn.encodings.PackedIntegers`.

Dims: N outputs, D inputs, G groups of inputs that share a scale, W words of packed codes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from tenfold.base.errors import CheckpointError
from tenfold.kernels.matmul import QuantizedWeight
from tenfold.nn.safetensors import Deferred


def pack(name: str, weights: Sequence[QuantizedWeight], dtype: np.dtype) -> dict[str, Deferred]:
    """The tensors of one quantised weight, put together when they are written.

    Args:
        name: of the plain tensor, which ends in "weight".
        weights: what stands under each other in it: one, or the parts of a fused tensor.
        dtype: of the scales.

    Raises:
        CheckpointError: if the weights have minima, or the parts are not quantised alike.
    """
    first = weights[0]
    if any(w.floats for w in weights):
        raise CheckpointError(f"{name}: floats of 8 bits cannot be written; load them as numbers")
    if any(w.mins is not None or w.zero != 2 ** (w.bits - 1) for w in weights):
        raise CheckpointError(f"{name}: only weights that are symmetric about zero can be written")
    if len({_format(w) for w in weights}) > 1:
        raise CheckpointError(f"{name}: its parts are quantised in different ways; quantise them alike")
    D, N = first.inputs, sum(w.codes.shape[1] for w in weights)
    words, groups = -(-D * first.bits // 32), len(first.scales)

    def codes() -> np.ndarray:
        return np.concatenate([_words(np.asarray(w.unpacked()).T, w.bits) for w in weights])

    def scales() -> np.ndarray:
        return np.concatenate([np.asarray(w.scales).T.astype(dtype) for w in weights])

    return {
        f"{name}_packed": Deferred(np.dtype(np.int32), (N, words), codes),
        f"{name}_scale": Deferred(dtype, (N, groups), scales),
        f"{name}_shape": Deferred(np.dtype(np.int64), (2,), lambda: np.array([N, D], np.int64)),
    }


def _words(codes: np.ndarray, bits: int) -> Int32[np.ndarray, "N W"]:
    """Codes in words of 32 bits, the first lowest; the last word is filled up with zeros."""
    per_word = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % per_word))).astype(np.uint32)
    places = padded.reshape(len(codes), -1, per_word) << (np.arange(per_word, dtype=np.uint32) * np.uint32(bits))
    return np.bitwise_or.reduce(places, axis=-1).view(np.int32)


def _format(weight: QuantizedWeight) -> tuple[int, int | None]:
    """The bits of a weight, and the inputs that share a scale; None for all of them."""
    return weight.bits, None if len(weight.scales) == 1 else weight.group


def describe(weights: Mapping[str, QuantizedWeight], plain: Sequence[str]) -> dict[str, Any]:
    """What config.json says as `quantization_config`.

    Args:
        weights: those that are quantised, by the names of their modules; a fused one under any of its parts.
        plain: the modules of linear maps that are not.
    """
    (usual, _), *others = Counter(_format(w) for w in weights.values()).most_common()
    formats = {usual: ["Linear"]} | {
        other: [name for name, w in weights.items() if _format(w) == other] for other, _ in others
    }
    groups = {f"group_{i}": _group(*kind, targets) for i, (kind, targets) in enumerate(formats.items())}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": sorted(plain),
        "kv_cache_scheme": None,
    }


def _group(bits: int, group: int | None, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False}
    shared = {"strategy": "channel"} if group is None else {"strategy": "group", "group_size": group}
    return {"targets": targets, "weights": weights | shared, "input_activations": None, "output_activations": None}
