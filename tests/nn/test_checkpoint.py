"""Checkpoints: what is exported loads again, files of others load, and what does not match is named."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold.base.errors import CheckpointError, ConfigError, UnsupportedModelError
from tenfold.nn import checkpoint
from tenfold.nn import param as params
from tenfold.nn import safetensors as ours
from tenfold.nn.param import Param, Tree, param
from tenfold.nn.stack import stack_layers

D, H, K, F, V = 6, 2, 4, 5, 7
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def layer(i: int) -> dict[str, Param]:
    at = f"model.layers.{i}"
    return {
        "q": param((D, H, K), "embed heads head_dim", f"{at}.qkv.weight", "(N K) D -> D N K", rows=(0, H * K)),
        "k": param((D, 1, K), "embed kv_heads head_dim", f"{at}.qkv.weight", "(N K) D -> D N K", rows=(8, 12)),
        "o": param((H, K, D), "heads head_dim embed", f"{at}.o.weight", "D (N K) -> N K D"),
        "up": param((D, F), "embed mlp", f"{at}.up.weight", "F D -> D F"),
        "norm": param((D,), "embed", f"{at}.norm.weight"),
    }


def declare(num_layers: int = 2) -> dict[str, Any]:
    return {
        "embed": param((V, D), "vocab embed", "embed.weight", aliases=("lm_head.weight",)),
        "layers": [layer(i) for i in range(num_layers)],
    }


def theirs(num_layers: int = 2) -> dict[str, np.ndarray]:
    """A checkpoint of `declare`, written down tensor by tensor."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    tensors = {"embed.weight": draw(V, D)}
    for i in range(num_layers):
        at = f"model.layers.{i}"
        tensors |= {f"{at}.qkv.weight": draw(H * K + K, D), f"{at}.o.weight": draw(D, H * K)}
        tensors |= {f"{at}.up.weight": draw(F, D), f"{at}.norm.weight": draw(D)}
    return tensors


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


def assert_loaded(arrays: Tree, tensors: dict[str, np.ndarray], num_layers: int = 2) -> None:
    """Compares by what the weights do to an input, as torch's Linear (y = weight @ x) does it."""
    np.testing.assert_array_equal(arrays["embed"], tensors["embed.weight"])
    x = np.random.default_rng(1).normal(size=(3, D)).astype(np.float32)
    o = np.random.default_rng(2).normal(size=(3, H, K)).astype(np.float32)
    for i in range(num_layers):
        w, at = arrays["layers"][i], f"model.layers.{i}"
        qk = x @ tensors[f"{at}.qkv.weight"].T
        np.testing.assert_allclose(np.einsum("td,dhk->thk", x, w["q"]).reshape(3, -1), qk[:, : H * K], rtol=1e-5)
        np.testing.assert_allclose(np.einsum("td,dhk->thk", x, w["k"]).reshape(3, -1), qk[:, H * K :], rtol=1e-5)
        out = o.reshape(3, -1) @ tensors[f"{at}.o.weight"].T
        np.testing.assert_allclose(np.einsum("thk,hkd->td", o, w["o"]), out, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(x @ np.asarray(w["up"]), x @ tensors[f"{at}.up.weight"].T, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(w["norm"], tensors[f"{at}.norm.weight"])


# --- loading --------------------------------------------------------------------------------------------------------


def test_one_file_loads(tmp_path: Path) -> None:
    arrays = checkpoint.load(save(tmp_path, theirs()), declare(), "float32")
    assert_loaded(arrays, theirs())


def test_the_arrays_outlive_the_file(tmp_path: Path) -> None:
    arrays = checkpoint.load(save(tmp_path, theirs()), declare(), "float32")
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as damaged:
        damaged.write(bytes(file.stat().st_size))
    file.unlink()
    assert_loaded(arrays, theirs())


def test_weights_lie_in_the_order_in_which_the_model_reads_them(tmp_path: Path) -> None:
    arrays = checkpoint.load(save(tmp_path, theirs()), declare(), "float32")
    for array in jax.tree.leaves(arrays):
        assert array.format.layout.major_to_minor == tuple(range(array.ndim))


def shard(path: Path, tensors: dict[str, np.ndarray], *, index: bool) -> Path:
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, path / file)
    if index:
        weight_map = {name: file for file, held in files.items() for name in held}
        (path / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize("index", [True, False])
def test_several_files_load_with_and_without_an_index(tmp_path: Path, index: bool) -> None:
    arrays = checkpoint.load(shard(tmp_path, theirs(), index=index), declare(), "float32")
    assert_loaded(arrays, theirs())


def test_a_second_copy_of_the_weights_is_left_alone(tmp_path: Path) -> None:
    shard(tmp_path, theirs(), index=False)
    safetensors.numpy.save_file({"tok_embeddings.weight": np.ones(3)}, tmp_path / "consolidated.safetensors")
    assert_loaded(checkpoint.load(tmp_path, declare(), "float32"), theirs())


def test_stacked_layers_load_equal_to_unstacked_ones(tmp_path: Path) -> None:
    save(tmp_path, theirs(3))
    tree = declare(3)
    plain = checkpoint.load(tmp_path, tree, "float32")
    stacked = checkpoint.load(tmp_path, tree | {"layers": stack_layers(tree["layers"], (0, 1, 0))}, "float32")
    np.testing.assert_array_equal(stacked["layers"]["scan"][1]["q"][0], plain["layers"][1]["q"])
    np.testing.assert_array_equal(stacked["layers"]["tail"][0]["o"], plain["layers"][2]["o"])


@pytest.mark.parametrize("held", ["lm_head.weight", "both"])
def test_tied_weights_load_under_any_of_their_names(tmp_path: Path, held: str) -> None:
    tensors = theirs()
    on_file = dict(tensors, **{"lm_head.weight": tensors["embed.weight"]})
    if held != "both":
        del on_file["embed.weight"]
    assert_loaded(checkpoint.load(save(tmp_path, on_file), declare(), "float32"), tensors)


def test_computed_buffers_of_old_exporters_are_ignored(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2), "h.0.attn.masked_bias": np.ones(())}
    assert_loaded(checkpoint.load(save(tmp_path, theirs() | extra), declare(), "float32"), theirs())


def test_what_the_caller_declares_unused_is_not_read(tmp_path: Path) -> None:
    extra = {"vision_tower.patches.weight": np.ones((2, 3, 4)), "audio.scale": np.ones(())}
    path = save(tmp_path, theirs() | extra)
    assert_loaded(checkpoint.load(path, declare(), "float32", skipped=("vision_tower.*", "audio.*")), theirs())
    with pytest.raises(CheckpointError, match=r"1 unexpected: audio\.scale \(in"):
        checkpoint.load(path, declare(), "float32", skipped=("vision_tower.*",))


@pytest.mark.parametrize("prefix", ["", "text.model.", "model."])
def test_tensors_load_under_other_prefixes(tmp_path: Path, prefix: str) -> None:
    declared = params.also_named(declare(), {"model.": ("", "text.model.")})
    renamed = {prefix + name.removeprefix("model.") if "layers" in name else name: t for name, t in theirs().items()}
    assert_loaded(checkpoint.load(save(tmp_path, renamed), declared, "float32"), theirs())


def test_files_in_other_dtypes_are_converted(tmp_path: Path) -> None:
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in theirs().items()}
    ours.write(tmp_path / "model.safetensors", narrow)
    arrays = checkpoint.load(tmp_path, declare(), "float32", progress=True)
    assert_loaded(arrays, {name: tensor.astype(np.float32) for name, tensor in narrow.items()})
    arrays = checkpoint.load(tmp_path, declare(), "bfloat16")
    np.testing.assert_array_equal(arrays["embed"], narrow["embed.weight"])


# --- what does not match --------------------------------------------------------------------------------------------


def without(*names: str) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in theirs().items() if name not in names}


Q = "model.layers.0.qkv.weight"
MISMATCHED = {
    "missing": (without("model.layers.1.up.weight"), r"1 missing: model\.layers\.1\.up\.weight$"),
    "many missing": (
        without(*(name for name in theirs() if "layers" in name)),
        r"8 missing: (model\S+, ){5}and 3 more$",
    ),
    "missing under every name": (without("embed.weight"), r"1 missing: embed\.weight$"),
    "unexpected": (
        theirs() | {"model.layers.2.up.weight": np.ones(2)},
        r"1 unexpected: model\.layers\.2\.up\.weight \(in model\.safetensors\)$",
    ),
    "fused shape": (
        theirs() | {Q: np.ones((16, D), np.float32)},
        r"qkv\.weight \(in model\.safetensors\) has the shape \[16, 6\] instead of \[12, 6\]$",
    ),
    "turned": (
        theirs() | {"model.layers.1.up.weight": np.ones((D, F), np.float32)},
        r"up\.weight \(in model\.safetensors\) has the shape \[6, 5\] instead of \[5, 6\]$",
    ),
    "integers": (theirs() | {Q: np.ones((12, D), np.int8)}, r"qkv\.weight \(in model\.safetensors\) is int8"),
    "all at once": (
        without("embed.weight") | {"x": np.ones(2), Q: np.ones(2, np.float32)},
        r"1 missing: embed\.weight; 1 unexpected: x \(in .*; 1 of the wrong kind: model\.layers\.0\.qkv",
    ),
}


@pytest.mark.parametrize("case", MISMATCHED)
def test_every_mismatch_is_named(tmp_path: Path, case: str) -> None:
    tensors, message = MISMATCHED[case]
    with pytest.raises(CheckpointError, match=message) as raised:
        checkpoint.load(save(tmp_path, tensors), declare(), "float32")
    assert str(tmp_path) in str(raised.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = shard(tmp_path, theirs(), index=True) / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is truncated: the tensor '"):
        checkpoint.load(tmp_path, declare(), "float32")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (shard(tmp_path, theirs(), index=True) / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002\.safetensors, of the 2 weight files"):
        checkpoint.load(tmp_path, declare(), "float32")


def edit_index(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shard(path, theirs(), index=True)
    index = json.loads((path / checkpoint.INDEX).read_text())
    index = change(index) or index
    (path / checkpoint.INDEX).write_text(json.dumps(index))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: {"weight_map": {}}, "has no weight_map"),
        (lambda index: {"weights": 1}, "has no weight_map"),
        (lambda index: [1], "must hold a JSON object"),
        (lambda index: index["weight_map"].update(x=7), "files beside it, not to 7"),
        (lambda index: index["weight_map"].update(x="../a.safetensors"), "files beside it, not to '../a.safetensors'"),
        (
            lambda index: index["weight_map"].update({"embed.weight": "model-00002-of-00002.safetensors"}),
            "says that model-00002-of-00002.safetensors holds the tensor embed.weight, which it does not",
        ),
    ],
)
def test_a_wrong_index_is_named(tmp_path: Path, change: Callable, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(edit_index(tmp_path, change), declare(), "float32")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    shard(tmp_path, theirs(), index=False)
    safetensors.numpy.save_file({Q: theirs()[Q]}, tmp_path / "extra.safetensors")
    with pytest.raises(CheckpointError, match=rf"the tensor {Q} is in both .*extra\.safetensors"):
        checkpoint.load(tmp_path, declare(), "float32")


def test_a_directory_without_safetensors_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        checkpoint.load(tmp_path, declare(), "float32")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"weights as pytorch_model\.bin;.*save_pretrained"):
        checkpoint.load(tmp_path, declare(), "float32")
    with pytest.raises(CheckpointError, match="is not a directory"):
        checkpoint.load(tmp_path / "absent", declare(), "float32")


# --- configuration --------------------------------------------------------------------------------------------------


def test_a_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert checkpoint.read_config(tmp_path) == CONFIG


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r"has no config\.json"), ("{", "is not valid JSON"), ("[]", "JSON object"), (b"\xff", "is not valid JSON")],
)
def test_a_bad_config_is_named(tmp_path: Path, text: str | bytes | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read_config(tmp_path)


def test_unknown_quantisation_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, theirs())
    config = CONFIG | {"quantization_config": {"quant_method": "aqlm", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (checkpoint.read_config, lambda path: checkpoint.load(path, declare(), "float32")):
        with pytest.raises(UnsupportedModelError, match=r"quantised.*quant_method='aqlm'"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, ()),
        (None, {}, ()),
        (None, {"eos_token_id": 2}, (2,)),
        ({"eos_token_id": [5, 6, 5]}, {"eos_token_id": 2}, (5, 6)),
        ({"eos_token_id": None}, {"eos_token_id": [2, 3]}, (2, 3)),
        ({"temperature": 0.6}, {"eos_token_id": 0}, (0,)),
    ],
)
def test_end_tokens(tmp_path: Path, generation: dict | None, config: dict | None, expected: tuple[int, ...]) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    assert checkpoint.read_eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize("wrong", ["</s>", [1, None], 1.5, True])
def test_end_tokens_of_the_wrong_type_are_named(tmp_path: Path, wrong: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(ConfigError, match="eos_token_id must be"):
        checkpoint.read_eos_token_ids(tmp_path)


# --- exporting ------------------------------------------------------------------------------------------------------


def test_an_export_holds_the_checkpoints_tensors(tmp_path: Path) -> None:
    arrays = checkpoint.load(save(tmp_path, theirs()), declare(), "float32")
    out = tmp_path / "new" / "model"
    checkpoint.export(
        out, declare(), arrays, config=CONFIG, dtype="float32", generation_config={"eos_token_id": [1, 2]}
    )
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    exported = safetensors.numpy.load_file(out / "model.safetensors")
    assert set(exported) == set(theirs())
    for name, tensor in theirs().items():
        np.testing.assert_array_equal(exported[name], tensor)
    config = checkpoint.read_config(out)
    assert config == CONFIG | {"dtype": "float32", "torch_dtype": "float32"}
    assert checkpoint.read_eos_token_ids(out) == (1, 2)
    with safetensors.safe_open(out / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_large_export_is_sharded_with_an_index(tmp_path: Path) -> None:
    arrays = checkpoint.load(save(tmp_path, theirs()), declare(), "float32")
    out = tmp_path / "out"
    checkpoint.export(out, declare(), arrays, config=CONFIG, dtype="bfloat16", max_shard_bytes=200)
    index = json.loads((out / checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.size * 2 for tensor in theirs().values())
    assert set(index["weight_map"]) == set(theirs())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    for name in files:
        tensors = ours.open(out / name)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 200 or len(tensors) == 1
    again = checkpoint.load(out, declare(), "float32")
    rounded = {name: tensor.astype(ml_dtypes.bfloat16).astype(np.float32) for name, tensor in theirs().items()}
    assert_loaded(again, rounded)


def test_an_export_replaces_an_older_one_and_keeps_other_files(tmp_path: Path) -> None:
    arrays = checkpoint.load(save(tmp_path, theirs()), declare(), "float32")
    out = tmp_path / "out"
    checkpoint.export(out, declare(), arrays, config=CONFIG, dtype="float32", max_shard_bytes=100, generation_config={})
    (out / "tokenizer.json").write_text("{}")
    checkpoint.export(out, declare(), arrays, config=CONFIG, dtype="float32")
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_failed_export_changes_nothing(tmp_path: Path) -> None:
    arrays = checkpoint.load(save(tmp_path, theirs()), declare(), "float32")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    broken = arrays | {"embed": arrays["embed"][:3]}
    with pytest.raises(ValueError, match=r"embed\.weight: announced"):
        checkpoint.export(tmp_path, declare(), broken, config=CONFIG, dtype="float32")
    with pytest.raises(ConfigError, match="'architectures'"):
        checkpoint.export(tmp_path, declare(), arrays, config={}, dtype="float32")
    partial = {"k": layer(0)["k"]}
    with pytest.raises(CheckpointError, match=r"qkv\.weight: the rows .* leave some out"):
        checkpoint.export(tmp_path, partial, {"k": arrays["layers"][0]["k"]}, config=CONFIG, dtype="float32")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


SIZE = st.integers(1, 4)
FUSED = st.lists(st.tuples(SIZE, SIZE), max_size=3)
PLAIN = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([None, "A B -> B A"]), st.tuples(SIZE, SIZE)),
        st.tuples(st.sampled_from(["(A B) C -> C A B", "C (B A) -> A B C"]), st.tuples(SIZE, SIZE, SIZE)),
        st.tuples(st.none(), st.just(())),
    ),
    max_size=3,
)


def declare_layer(i: int, columns: int, fused: list[Any], plain: list[Any]) -> dict[str, Param]:
    """A layer of fused tensors, given as (heads, dims) of their parts, and plain ones, as (layout, shape)."""
    declared: dict[str, Param] = {}
    row = 0
    for j, (heads, dim) in enumerate(fused):
        rows = (row, row := row + heads * dim)
        shape = (columns, heads, dim)
        declared[f"fused{j}"] = param(shape, "embed heads head_dim", f"{i}.fused", "(A B) C -> C A B", rows=rows)
    for j, (layout, shape) in enumerate(plain):
        declared[f"plain{j}"] = param(shape, " ".join(["embed"] * len(shape)), f"{i}.{j}", layout)
    return declared


def draw_arrays(tree: Tree) -> Tree:
    rng = np.random.default_rng(0)
    return params.map_params(lambda p: jax.device_put(rng.normal(size=p.shape).astype(np.float32)), tree)


@given(
    num_layers=st.integers(1, 3),
    columns=SIZE,
    fused=FUSED,
    plain=PLAIN,
    stacked=st.booleans(),
    max_shard_bytes=st.integers(8, 400),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_what_is_exported_loads_equal(
    tmp_path: Path, num_layers: int, columns: int, fused: list, plain: list, stacked: bool, max_shard_bytes: int
) -> None:
    tree: Tree = [declare_layer(i, columns, fused, plain) for i in range(num_layers)]
    tree = stack_layers(tree, [0] * num_layers) if stacked else tree
    arrays = draw_arrays(tree)
    checkpoint.export(tmp_path, tree, arrays, config=CONFIG, dtype="float32", max_shard_bytes=max_shard_bytes)
    loaded = checkpoint.load(tmp_path, tree, "float32")
    assert jax.tree.structure(loaded) == jax.tree.structure(arrays)
    jax.tree.map(np.testing.assert_array_equal, loaded, arrays)
    on_file = sum(math.prod(info.shape) for f in tmp_path.glob("*.safetensors") for info in ours.open(f).infos.values())
    assert on_file == params.count(tree)
