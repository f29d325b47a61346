"""Weights loaded from GGUF files, against the package `gguf` and against those that the files were made from."""

from pathlib import Path

import gguf as library
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import quants

from tenfold.base import ggml_blocks, gguf
from tenfold.base.errors import CheckpointError, UnsupportedModelError
from tenfold.base.ggml_blocks import FLOATS, GGMLType
from tenfold.base.gguf import Deferred
from tenfold.kernels.matmul import QuantizedWeight
from tenfold.models.family import resolve
from tenfold.nn import checkpoint, gguf_checkpoint, quantization
from tenfold.nn.param import Tree, is_param, leaves, shardings
from tenfold.parallel.sharding import make_mesh
from tests.base.test_gguf_names import HALVED, config_of, hf_tensors, write_model
from tests.gguf_files import CONFIG, HEADS, metadata, stored, tensors, write_pico, write_split

Q8_0, MXFP4 = library.GGMLQuantizationType.Q8_0, library.GGMLQuantizationType.MXFP4
BLOCKS = [kind for kind in GGMLType if kind not in FLOATS]
MODEL = resolve(CONFIG)
PICO = MODEL.params()


def expected(tree: Tree, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The weights of a tree as matrices [inputs, outputs], or as they are, out of a checkpoint's tensors."""
    found = []
    for _, p in leaves(tree):
        arrays = [tensors[source.name] for source in p.sources]
        if p.stack_dims:
            found.append(np.stack([array.T for array in arrays]))
            continue
        [array], rows = arrays, p.sources[0].rows
        array = array if rows is None else array[slice(*rows)]
        found.append(array.T if p.inputs and array.ndim == 2 else array.reshape(p.shape))
        if p.experts and p.inputs:
            found[-1] = array  # inputs come first in fused experts
    return found


def matrices(tree: Tree, loaded: Tree) -> list[np.ndarray]:
    """What was loaded, in the same form."""
    params, treedef = jax.tree.flatten(tree, is_leaf=is_param)
    found = []
    for p, weight in zip(params, treedef.flatten_up_to(loaded), strict=True):
        if isinstance(weight, QuantizedWeight):
            assert weight.dims == p.output_dims
            found.append(np.asarray(weight.dequantize(jnp.float32)))
        else:
            assert weight.shape == p.shape
            found.append(np.asarray(p.as_matrix(weight) if p.inputs else weight, np.float32))
    return found


def published(path: Path) -> dict[str, np.ndarray]:
    """The built-in model's tensors as the library reads them, with the rows of q and k in a checkpoint's order."""
    found = {}
    naming = library.get_tensor_name_map(library.MODEL_ARCH.LLAMA, CONFIG["num_hidden_layers"])
    read = {t.name: quants.dequantize(t.data, t.tensor_type) for t in library.GGUFReader(path).tensors}
    for _, p in leaves(PICO):
        name = p.sources[0].name
        array = read[naming.get_name(name, try_suffixes=(".weight",))]
        heads = HEADS.get(name.split(".")[-2])
        if heads is not None:
            array = array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        found[name] = array
    return found


@pytest.mark.parametrize("kind", [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q8_0, GGMLType.Q4_0])
def test_weights_are_those_that_the_library_reads(tmp_path: Path, kind: GGMLType) -> None:
    write_pico(tmp_path / "pico.gguf", kind)
    loaded = checkpoint.load(tmp_path, PICO, jnp.float32)
    for found, wanted in zip(matrices(PICO, loaded), expected(PICO, published(tmp_path / "pico.gguf")), strict=True):
        np.testing.assert_array_equal(found, wanted)
    quantized = [leaf for leaf in jax.tree.leaves(loaded, is_leaf=_is_quantized) if _is_quantized(leaf)]
    assert {weight.bits for weight in quantized} == {GGMLType.Q8_0: {8}, GGMLType.Q4_0: {4}}.get(kind, set())


def _is_quantized(leaf: object) -> bool:
    return isinstance(leaf, QuantizedWeight)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_every_format(tmp_path: Path, kind: GGMLType) -> None:
    """Of random blocks: held unrounded, in the bytes that are planned for."""
    random = np.random.default_rng(5)

    def blocks(shape: tuple[int, ...]) -> np.ndarray:
        raw = random.integers(0, 256, (shape[0], ggml_blocks.row_size(kind, shape[1])), np.uint8)
        view = raw.reshape(-1)[: raw.size].view(ggml_blocks._FORMATS[kind].record)
        for field in ("d", "m", "dmin"):
            if field in (view.dtype.names or ()):
                view[field] = random.uniform(0.001, 0.01, view.shape)
        if "e" in (view.dtype.names or ()):
            view["e"] = random.integers(118, 122, view.shape)
        return raw

    written = tensors(GGMLType.F32)
    made = {name: blocks(t.shape) for name, t in written.items() if len(t.shape) == 2}
    written |= {name: Deferred(kind, written[name].shape, lambda raw=raw: raw) for name, raw in made.items()}
    gguf.write(tmp_path / "pico.gguf", metadata(), written)
    loaded = checkpoint.load(tmp_path, PICO, jnp.float32)
    wanted = expected(PICO, published(tmp_path / "pico.gguf"))
    for found, array in zip(matrices(PICO, loaded), wanted, strict=True):
        np.testing.assert_allclose(found, array, rtol=1e-6, atol=1e-6)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    assert quantization.nbytes(PICO, jnp.float32, checkpoint.read_quantization(tmp_path)) == held


def test_stacked_and_sharded_weights_are_numbers(tmp_path: Path) -> None:
    write_pico(tmp_path / "pico.gguf", GGMLType.Q4_0)
    wanted = published(tmp_path / "pico.gguf")
    params, treedef = jax.tree.flatten(MODEL.params(stacked=True), is_leaf=is_param)
    loaded = treedef.flatten_up_to(checkpoint.load(tmp_path, treedef.unflatten(params), jnp.float32))
    stacked = [(p, leaf) for p, leaf in zip(params, loaded, strict=True) if p.stacked and p.inputs]
    assert len(stacked) == 7
    for p, leaf in stacked:
        for source, layer in zip(p.sources, p.as_matrix(leaf), strict=True):
            np.testing.assert_array_equal(layer, wanted[source.name].T)
    mesh = make_mesh({"tensor": 2})
    split = checkpoint.load(tmp_path, PICO, jnp.float32, shardings=shardings(PICO, mesh))
    for found, array in zip(matrices(PICO, split), expected(PICO, wanted), strict=True):
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "name",
    [
        *("llama-biases", "gemma2", "gemma3-layer-types", "phi3-longrope-short", "olmo3", "smollm3"),
        *("mixtral", "qwen2_moe-v4", "qwen2_moe-sliding", "deepseek_v2-yarn-v4", "deepseek_v3", "gpt_oss"),
    ],
)
def test_families(tmp_path: Path, name: str) -> None:
    """With norms that hold one more, biases of interleaved rows, fused tensors, stacked experts, and halves."""
    config = config_of(name)
    write_model(tmp_path / "model.gguf", config, halved=name in HALVED)
    tree = resolve(config).params()
    loaded = checkpoint.load(tmp_path, tree, jnp.float32)
    for found, wanted in zip(matrices(tree, loaded), expected(tree, hf_tensors(config)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-7)  # one more, and less again


def test_experts_in_blocks_are_held_as_they_are_stored(tmp_path: Path) -> None:
    config = config_of("mixtral") | {"hidden_size": 64, "intermediate_size": 32}
    write_model(tmp_path / "model.gguf", config, blocks=Q8_0)
    tree = resolve(config).params()
    loaded = checkpoint.load(tmp_path, tree, jnp.float32)
    rounded = hf_tensors(config)
    for name, array in rounded.items():
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            rounded[name] = quants.dequantize(quants.quantize(array, Q8_0), Q8_0)
    for (_, p), weight, found, wanted in zip(
        leaves(tree),
        jax.tree.leaves(loaded, is_leaf=_is_quantized),
        matrices(tree, loaded),
        expected(tree, rounded),
        strict=True,
    ):
        assert _is_quantized(weight) == (bool(p.inputs) and p.input_size % 32 == 0), p
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
    experts = loaded["layers"][0]["down"]
    assert (experts.bits, experts.codes.shape) == (8, (6, 32, 64))
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    assert quantization.nbytes(tree, jnp.float32, checkpoint.read_quantization(tmp_path)) == held


def test_fused_experts_in_blocks_are_held_as_they_are_stored(tmp_path: Path) -> None:
    """gpt-oss's, whose gates and ups are rows of two tensors."""
    config = config_of("gpt_oss") | {"hidden_size": 64, "intermediate_size": 32}
    write_model(tmp_path / "model.gguf", config, blocks=MXFP4)
    tree = resolve(config).params()
    loaded = checkpoint.load(tmp_path, tree, jnp.float32)
    for name, hf in (("gate_up_pairs", "gate_up_proj"), ("down", "down_proj")):
        weight = loaded["layers"][1][name]
        assert isinstance(weight, QuantizedWeight)
        stored = hf_tensors(config)[f"model.layers.1.mlp.experts.{hf}"].swapaxes(1, 2)
        wanted = quants.dequantize(quants.quantize(np.ascontiguousarray(stored), MXFP4), MXFP4).swapaxes(1, 2)
        np.testing.assert_array_equal(weight.dequantize(jnp.float32), wanted)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    assert quantization.nbytes(tree, jnp.float32, checkpoint.read_quantization(tmp_path)) == held


def test_a_split(tmp_path: Path) -> None:
    write_split(tmp_path, GGMLType.BF16)
    loaded = checkpoint.load(tmp_path, PICO, jnp.bfloat16, finish=lambda p, weight: (p.sources[0].name, weight))
    names = {name for name in jax.tree.leaves(loaded) if isinstance(name, str)}
    assert names == {p.sources[0].name for _, p in leaves(PICO)}


def test_all_that_does_not_match_is_named(tmp_path: Path) -> None:
    written = tensors(GGMLType.F32)
    del written["blk.2.ffn_up.weight"], written["output_norm.weight"]
    norm = stored("model.norm.weight")[:-1]
    written["blk.0.attn_norm.weight"] = Deferred(GGMLType.F32, norm.shape, lambda: norm)
    written["blk.0.attn_q.bias"] = Deferred(GGMLType.F32, norm.shape, lambda: norm)
    gguf.write(tmp_path / "pico.gguf", metadata(), written)
    with pytest.raises(CheckpointError) as raised:
        checkpoint.load(tmp_path, PICO, jnp.float32)
    message = str(raised.value)
    assert "2 missing: model.layers.2.mlp.up_proj.weight, model.norm.weight" in message
    assert "1 unexpected: blk.0.attn_q.bias" in message
    assert "1 of the wrong shape: blk.0.attn_norm.weight has the shape [255] instead of [256]" in message


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.gguf file"):
        gguf_checkpoint.read_format(tmp_path)
    write_pico(tmp_path / "pico.gguf", GGMLType.Q8_0, general__architecture="mamba")
    with pytest.raises(UnsupportedModelError, match="mamba"):
        checkpoint.load(tmp_path, PICO, jnp.float32)
    write_pico(tmp_path / "pico.gguf", GGMLType.Q8_0)
    content = (tmp_path / "pico.gguf").read_bytes()
    (tmp_path / "pico.gguf").write_bytes(content[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.load(tmp_path, PICO, jnp.float32)
