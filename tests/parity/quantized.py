"""What compressed-tensors, AutoGPTQ and transformers make of quantised weights: run by the interpreter that has torch.

    .venv-peers/bin/python -m pip install --no-deps compressed-tensors==0.20.0 loguru psutil
    .venv-peers/bin/python -m pip download --no-deps --dest build auto-gptq==0.7.1
    .venv-peers/bin/python -m tests.parity.quantized --write tests/nn/golden --auto-gptq build/auto_gptq-0.7.1-*.whl

A golden file is a checkpoint's tensors as its format has them; `expected.NAME`, the numbers that the other library
reads them as; and in its metadata, what config.json says. Running it twice on one machine writes the same bytes.
"""

import argparse
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.parity.cases import SIZES, make_weight

NAME = "model.layers.0.mlp.up_proj.weight"
MODULE = NAME.removesuffix(".weight")
DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
DYNAMIC_FP8 = DYNAMIC | {"type": "float"}
COMPRESSED: dict[str, dict[str, Any]] = {
    "pack-int4-group": {"format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 16},
    "pack-int4-group-asymmetric": {
        "format": "pack-quantized", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False,
    },
    "pack-int4-channel": {"format": "pack-quantized", "num_bits": 4, "strategy": "channel", "dtype": torch.float32},
    "pack-int4-odd": {"format": "pack-quantized", "num_bits": 4, "strategy": "channel", "shape": (10, 37)},
    "pack-int8-channel-asymmetric": {
        "format": "pack-quantized", "num_bits": 8, "strategy": "channel", "symmetric": False, "dtype": torch.float16,
    },
    "pack-int8-group": {"format": "pack-quantized", "num_bits": 8, "strategy": "group", "group_size": 16},
    "int8-channel": {"format": "int-quantized", "num_bits": 8, "strategy": "channel", "inputs": DYNAMIC},
    "int8-tensor-asymmetric": {
        "format": "int-quantized", "num_bits": 8, "strategy": "tensor", "symmetric": False, "inputs": DYNAMIC,
    },
    "naive-int4-group": {"format": "naive-quantized", "num_bits": 4, "strategy": "group", "group_size": 32},
    "float8-channel": {
        "format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "channel", "inputs": DYNAMIC_FP8,
    },
    "float8-tensor": {"format": "naive-quantized", "num_bits": 8, "type": "float", "strategy": "tensor"},
    "float8-block": {
        "format": "float-quantized", "num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16],
        "inputs": DYNAMIC_FP8,
    },
}  # fmt: skip


def draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Weights whose rows, and whose blocks of columns, differ in size and are off center."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.uniform(0.2, 2, (shape[0], 1)), np.repeat(rng.uniform(0.2, 2, -(-shape[1] // 8)), 8)
    values = (rng.standard_normal(shape) + 0.3) * rows * columns[: shape[1]]
    return torch.tensor(values, dtype=torch.float32).to(dtype)


def extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The smallest and largest weight of all that share a scale, in the shape that the scales have."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    rows, columns = (1, args.group_size) if args.strategy == "group" else args.block_structure
    blocks = [part.split(columns, 1) for part in weight.split(rows)]
    low = torch.stack([torch.stack([block.min() for block in row]) for row in blocks])
    return low, torch.stack([torch.stack([block.max() for block in row]) for row in blocks])


def compressed(name: str, case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One module as compressed-tensors stores it, with what it decompresses to, and the config that it writes."""
    case = dict(case)
    form, inputs = case.pop("format"), case.pop("inputs", None)
    weight = draw(case.pop("shape", (16, 64)), len(name), case.pop("dtype", torch.bfloat16))
    args = QuantizationArgs(**case)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs, format=form)
    scale, zero = calculate_qparams(*extremes(weight, args), args)
    state = {"weight": weight, "weight_scale": scale.to(weight.dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero.round().to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        quantization_status=QuantizationStatus.COMPRESSED,
        format=form,
        ignore=["lm_head"],
    )
    tensors = {f"{MODULE}.{part}": tensor.contiguous() for part, tensor in stored.items()}
    return tensors | {f"expected.{NAME}": expected}, config.model_dump(mode="json") | {"version": "0.20.0"}


def awq() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """AutoAWQ's packing of random codes, read by compressed-tensors' converter."""
    N, D, group = 40, 64, 16
    rng = np.random.default_rng(7)
    scales = torch.tensor(rng.uniform(0.01, 0.2, (D // group, N)), dtype=torch.float16)

    def pack(codes: np.ndarray) -> torch.Tensor:
        words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
        for column in range(words.shape[1]):
            for place, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                words[:, column] |= codes[:, column * 8 + output].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(words.view(np.int32))

    stored = {
        f"{MODULE}.qweight": pack(rng.integers(0, 16, (D, N))),
        f"{MODULE}.qzeros": pack(rng.integers(0, 16, (D // group, N))),
        f"{MODULE}.scales": scales,
    }
    converter = AutoAWQConverter(group_size=group)
    converted = converter.process(dict(stored))
    scheme = converter.update_config(None).config_groups["config_group_0"]
    parts = {name.removeprefix(f"{MODULE}."): tensor for name, tensor in converted.items()}
    expected = BaseCompressor.get_value_from_registry("pack-quantized").decompress(parts, scheme)["weight"]
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return stored | {f"expected.{NAME}": expected}, config | {"modules_to_not_convert": None}


def read_auto_gptq(wheel: Path) -> Any:
    """The class of AutoGPTQ's layer in PyTorch. The whole package cannot be imported: it wants older transformers."""
    module: dict[str, Any] = {"__name__": "qlinear"}
    exec(zipfile.ZipFile(wheel).read("auto_gptq/nn_modules/qlinear/qlinear_cuda.py"), module)
    return module["QuantLinear"]


def gptq(layer_class: Any, bits: int, group: int, *, ordered: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Packed by AutoGPTQ's layer, and read by it: what it makes of the rows of the unit matrix.

    Not `ordered`: inputs belong to groups by importance (desc_act), so that neighbours have different scales.
    """
    N, D = 32, 64
    rng = np.random.default_rng(bits)
    layer = layer_class(bits, group, D, N, bias=False)
    of = torch.arange(D, dtype=torch.int32) // group
    linear = torch.nn.Linear(D, N, bias=False)
    linear.weight.data = draw((N, D), 17)
    scales = torch.tensor(rng.uniform(0.02, 0.2, (N, D // group)), dtype=torch.float32)
    zeros = torch.tensor(rng.integers(1, 2**bits, (N, D // group)), dtype=torch.float32)
    groups = of if ordered else of[torch.from_numpy(rng.permutation(D))]
    steps = linear.weight.data / scales[:, groups.long()] + zeros[:, groups.long()]
    codes = steps.round().clamp(0, 2**bits - 1)  # as quantisers cut off what does not fit, before they pack
    linear.weight.data = (codes - zeros[:, groups.long()]) * scales[:, groups.long()]
    layer.pack(linear, scales, zeros, groups)
    expected = layer(torch.eye(D)).T.to(torch.float32)
    parts = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales, "g_idx": layer.g_idx}
    stored = {f"{MODULE}.{name}": tensor.clone() for name, tensor in parts.items()}
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": not ordered, "sym": False}
    return stored | {f"expected.{NAME}": expected}, config


def fp8(block: tuple[int, int] | None, *, powers: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """DeepSeek's blocks, whose last ones are ragged, read by compressed-tensors; others by transformers."""
    shape = (24, 40) if block and not powers else (16, 32)
    weight = draw(shape, 11)
    rows, columns = block or shape
    scale = torch.stack(
        [torch.stack([b.abs().max() / 448 for b in part.split(columns, 1)]) for part in weight.split(rows)]
    )
    if powers:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    wide = scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
    codes = (weight / wide).to(torch.float8_e4m3fn)
    if block is None:
        scale = scale.reshape(())
    stored_scale = scale.to(torch.float8_e8m0fnu) if powers else scale
    if block and not powers:
        expected = FP8BlockDequantizer(weight_block_size=block, dtype=torch.float32)._create_dequantized_weight(
            codes, scale
        )
    else:
        expected = Fp8Dequantize(None)._dequantize_one(codes, stored_scale, torch.float32)
    stored = {NAME: codes, f"{MODULE}.weight_scale_inv": stored_scale}
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    return stored | {f"expected.{NAME}": expected}, config | ({"scale_fmt": "ue8m0"} if powers else {})


def mxfp4() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Experts as gpt-oss has them, whose numbers transformers turns around; the first one also as a weight."""
    rng = np.random.default_rng(13)
    blocks = torch.from_numpy(rng.integers(0, 256, (2, 12, 2, 16), dtype=np.uint8))
    scales = torch.from_numpy(rng.integers(110, 131, (2, 12, 2), dtype=np.uint8))
    experts = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    stored = {f"{MODULE}.weight_blocks": blocks[0].clone(), f"{MODULE}.weight_scales": scales[0].clone()}
    stored |= {"experts_blocks": blocks, "experts_scales": scales, "expected.experts": experts}
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return stored, config


@torch.inference_mode()
def llama() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A whole model: quantised and saved by compressed-tensors, loaded and run by transformers."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, "vocab_size": 48, "hidden_size": 32,
        "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "dtype": "float32",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        (path / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).state_dict()
        weights = {name: torch.from_numpy(make_weight(name, tuple(t.shape), config, 0)) for name, t in shapes.items()}
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        args = QuantizationArgs(num_bits=4, strategy="group", group_size=8, symmetric=False)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}
        ignore = ["lm_head", "re:.*layers\\.1\\.mlp\\..*"]
        apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=ignore))
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                scale, zero = calculate_qparams(*extremes(module.weight, args), args)
                module.weight_scale.copy_(scale)
                module.weight_zero_point.copy_(zero.round())
                module.quantization_status = QuantizationStatus.FROZEN
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(path / "compressed")
        compressor.update_config(path / "compressed")
        stored = load_file(path / "compressed" / "model.safetensors")
        written = json.loads((path / "compressed" / "config.json").read_text())
        numbers = CompressedTensorsConfig(dequantize=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            path / "compressed", dtype=torch.float32, quantization_config=numbers
        )
        tokens = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 9, 7]])
        logits = loaded(tokens).logits[0]
        expected = {
            f"expected.{name}": tensor
            for name, tensor in loaded.state_dict().items()
            if name not in stored and name.endswith(".weight")
        }
    return stored | expected | {"tokens": tokens[0], "logits": logits}, written


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path, required=True)
    parser.add_argument("--auto-gptq", type=Path, required=True, help="its wheel")
    given = parser.parse_args()
    directory, layer_class = given.write, read_auto_gptq(given.auto_gptq)
    cases = {name: compressed(name, case) for name, case in COMPRESSED.items()}
    cases |= {
        "awq": awq(),
        "gptq-int4": gptq(layer_class, 4, 16, ordered=True),
        "gptq-int4-by-importance": gptq(layer_class, 4, 16, ordered=False),
        "gptq-int8": gptq(layer_class, 8, 32, ordered=True),
        "fp8-block": fp8((16, 16)),
        "fp8-powers": fp8((8, 16), powers=True),
        "fp8-tensor": fp8(None),
    }
    cases["mxfp4"] = mxfp4()
    made = {name: (tensors, {"quantization_config": config}) for name, (tensors, config) in cases.items()}
    for name, (tensors, config) in (made | {"llama": llama()}).items():
        metadata = {"config": json.dumps(config, sort_keys=True)}
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, directory / f"{name}.safetensors", metadata
        )


if __name__ == "__main__":
    main()
