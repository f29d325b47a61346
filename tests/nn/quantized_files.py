"""Small quantised checkpoints on disk, and what their formats say about each weight, one at a time in plain Python."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from tenfold.kernels.matmul import QuantizedWeight
from tenfold.nn import checkpoint, safetensors
from tenfold.nn.param import Param, Tree, param

NAME = "model.layers.0.mlp.up_proj.weight"
MODULE = NAME.removesuffix(".weight")
Tensors = dict[str, np.ndarray]


def declare(N: int, D: int, **more: Any) -> dict[str, Param]:
    return {"up": param((D, N), "embed mlp", NAME, "F D -> D F", **({"inputs": "embed"} | more))}


def write(path: Path, tensors: Tensors, config: dict[str, Any]) -> Path:
    """A checkpoint of tensors, and of what `quantization_config` says, or of a whole config.json."""
    path.mkdir(exist_ok=True)
    whole = config if "quantization_config" in config else {"quantization_config": config}
    (path / "config.json").write_text(json.dumps(whole))
    safetensors.write(path / "model.safetensors", tensors)
    return path


def load(path: Path, tensors: Tensors, config: dict[str, Any], tree: Tree, dtype: str = "float32") -> Tree:
    return checkpoint.load(write(path, tensors, config), tree, dtype)


def numbers(weight: jax.Array | QuantizedWeight) -> np.ndarray:
    """A loaded matrix [inputs, outputs] as the checkpoint has it: [N, D] in float32."""
    if not isinstance(weight, QuantizedWeight):
        return np.asarray(weight, np.float32).T
    codes = np.asarray(weight.codes)
    if weight.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(2 * len(codes), -1)
    if weight.floats:
        codes = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scales = np.repeat(np.asarray(weight.scales), weight.group, axis=0)
    with np.errstate(invalid="ignore"):  # damaged scales
        mins = weight.zero * scales if weight.mins is None else np.repeat(np.asarray(weight.mins), weight.group, axis=0)
        return (codes * scales - mins).T


def each(N: int, D: int, weight: Callable[[int, int], float]) -> np.ndarray:
    """The matrix [N, D] of what a formula says about output n and input d."""
    return np.array([[weight(n, d) for d in range(D)] for n in range(N)], np.float64).reshape(N, D)


def code(words: np.ndarray, row: int, column: int, place: int, bits: int) -> int:
    """An unsigned code in a word of 32 bits."""
    return (int(words[row, column]) >> (bits * place)) & (2**bits - 1)


def gptq(t: Tensors, N: int, D: int, bits: int, group_of: Callable[[int], int], *, v2: bool) -> np.ndarray:
    """scale · (code - zero), where zero is stored minus one in the first version of the format."""
    per = 32 // bits

    def weight(n: int, d: int) -> float:
        g = group_of(d)
        zero = code(t[f"{MODULE}.qzeros"], g, n // per, n % per, bits) + (0 if v2 else 1)
        return float(t[f"{MODULE}.scales"][g, n]) * (code(t[f"{MODULE}.qweight"], d // per, n, d % per, bits) - zero)

    return each(N, D, weight)


def awq(t: Tensors, N: int, D: int, group: int) -> np.ndarray:
    """scale · (code - zero), with the outputs 0, 2, 4, 6, 1, 3, 5, 7 in a word."""
    place = {output: i for i, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7))}

    def weight(n: int, d: int) -> float:
        number, zero = (code(t[f"{MODULE}.{part}"], row, n // 8, place[n % 8], 4)
                        for part, row in (("qweight", d), ("qzeros", d // group)))  # fmt: skip
        return float(t[f"{MODULE}.scales"][d // group, n]) * (number - zero)

    return each(N, D, weight)


def packed(t: Tensors, N: int, D: int, bits: int, group_of: Callable[[int], int], *, symmetric: bool) -> np.ndarray:
    """scale · (code - zero), both offset by half the range."""
    per, half = 32 // bits, 2 ** (bits - 1)

    def weight(n: int, d: int) -> float:
        g = group_of(d)
        zero = 0 if symmetric else code(t[f"{MODULE}.weight_zero_point"], n // per, g, n % per, bits) - half
        number = code(t[f"{MODULE}.weight_packed"], n, d // per, d % per, bits) - half
        return float(t[f"{MODULE}.weight_scale"][n, g]) * (number - zero)

    return each(N, D, weight)


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)


def scales(rng: np.random.Generator, *shape: int, dtype: Any = np.float16) -> np.ndarray:
    return rng.uniform(0.01, 0.3, shape).astype(dtype)


def draw_gptq(rng: np.random.Generator, N: int, D: int, bits: int, group: int | None, *, v2: bool = True) -> Tensors:
    """Random words; as the first version, only zero points that it can store without borrowing."""
    G = -(-D // group) if group else 1
    zeros = words(rng, G, -(-N * bits // 32))
    if not v2:
        zeros &= np.int32(0x66666666 if bits == 4 else 0x7E7E7E7E)
    return {
        f"{MODULE}.qweight": words(rng, -(-D * bits // 32), N),
        f"{MODULE}.qzeros": zeros,
        f"{MODULE}.scales": scales(rng, G, N),
        f"{MODULE}.g_idx": (np.arange(D) // (group or D)).astype(np.int32),
    }


def draw_awq(rng: np.random.Generator, N: int, D: int, group: int) -> Tensors:
    return {
        f"{MODULE}.qweight": words(rng, D, N // 8),
        f"{MODULE}.qzeros": words(rng, D // group, N // 8),
        f"{MODULE}.scales": scales(rng, D // group, N),
    }


def draw_packed(rng: np.random.Generator, N: int, D: int, bits: int, group: int | None, *, symmetric: bool) -> Tensors:
    G = -(-D // group) if group else 1
    tensors = {
        f"{MODULE}.weight_packed": words(rng, N, -(-D * bits // 32)),
        f"{MODULE}.weight_scale": scales(rng, N, G),
        f"{MODULE}.weight_shape": np.array([N, D]),
    }
    return tensors if symmetric else tensors | {f"{MODULE}.weight_zero_point": words(rng, -(-N * bits // 32), G)}


def compressed_config(form: str = "pack-quantized", ignore: list[str] | None = None, **weights: Any) -> dict[str, Any]:
    """What compressed-tensors writes into config.json."""
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False} | weights
    group = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ignore or [],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }


def gptq_config(bits: int, group: int | None, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "desc_act": False, "sym": False} | more


def awq_config(group: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True} | more


N, D = 16, 32
"""The shape of the weight in `CASES`."""


def _cases() -> dict[str, tuple[Tensors, dict[str, Any]]]:
    rng = np.random.default_rng(0)
    grouped = {"strategy": "group", "group_size": 8, "symmetric": False}
    return {
        "gptq": (draw_gptq(rng, N, D, 4, 8), gptq_config(4, 8, checkpoint_format="gptq_v2")),
        "gptq 8 bits": (draw_gptq(rng, N, D, 8, None), gptq_config(8, None, format="gptq_v2")),
        "awq": (draw_awq(rng, N, D, 8), awq_config(8)),
        "packed": (draw_packed(rng, N, D, 4, 8, symmetric=False), compressed_config(**grouped)),
        "integers": (
            {NAME: rng.integers(-128, 128, (N, D)).astype(np.int8), f"{MODULE}.weight_scale": scales(rng, N, 1)},
            compressed_config("int-quantized", num_bits=8),
        ),
        "fp8": (
            {
                NAME: rng.standard_normal((N, D)).astype(ml_dtypes.float8_e4m3fn),
                f"{MODULE}.weight_scale_inv": scales(rng, 2, 2, dtype=np.float32),
            },
            {"quant_method": "fp8", "weight_block_size": [8, 16], "activation_scheme": "dynamic"},
        ),
        "mxfp4": (
            {
                f"{MODULE}.weight_blocks": rng.integers(0, 256, (N, 1, 16), dtype=np.uint8),
                f"{MODULE}.weight_scales": rng.integers(110, 130, (N, 1), dtype=np.uint8),
            },
            {"quant_method": "mxfp4"},
        ),
    }


CASES = _cases()
"""A weight in each format, with what `quantization_config` says of it."""
