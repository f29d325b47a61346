"""A model that lies on four devices computes what it computes on one, and each holds its share."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tenfold.nn import param as params
from tenfold.nn.packed import packed_attend
from tenfold.nn.param import Tree
from tenfold.parallel.sharding import make_mesh

HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 52,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,  # which four devices cannot split
    "head_dim": 6,
    "max_position_embeddings": 64,
}
MODEL = resolve(HF)
TOKENS = jnp.asarray([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])


@jax.jit
def run(weights: Tree) -> tuple[jax.Array, jax.Array]:
    attend = packed_attend(jnp.zeros((1, len(TOKENS)), jnp.int32))
    x, _ = MODEL.forward(weights, TOKENS, jnp.arange(len(TOKENS)), attend)
    return x, MODEL.logits(weights, x)


def bytes_per_device(weights: Tree) -> dict[jax.Device, int]:
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.tree.leaves(weights):
        for shard in array.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return held


def assert_same_model(sharded: Tree, single: Tree, mesh_shape: dict[str, int]) -> None:
    """The same weights, hidden states and logits; and on every device as many bytes as the default rules say."""
    jax.tree.map(np.testing.assert_array_equal, sharded, single)
    for ours, expected in zip(run(sharded), run(single), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    mesh_axes = {"embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor"}
    expected_bytes = 0
    for _, p in params.leaves(MODEL.params()):
        ways = [mesh_shape.get(mesh_axes.get(axis, ""), 1) for axis in p.axes.split()]
        expected_bytes += 4 * math.prod(n // w if n % w == 0 else n for n, w in zip(p.shape, ways, strict=True))
    assert set(bytes_per_device(sharded).values()) == {expected_bytes}
    assert expected_bytes < params.nbytes(MODEL.params(), "float32") / 3


def test_a_checkpoint_loads_onto_a_mesh(tmp_path: Path) -> None:
    tree, rng = MODEL.params(), np.random.default_rng(0)
    single = params.map_params(lambda p: jax.device_put(rng.normal(0, 0.1, p.shape).astype(np.float32)), tree)
    checkpoint.export(tmp_path, tree, single, config=HF, dtype="float32", max_shard_bytes=5000)
    shardings = params.shardings(tree, make_mesh({"tensor": 4}))
    assert_same_model(checkpoint.load(tmp_path, tree, "float32", shardings=shardings), single, {"tensor": 4})


@pytest.mark.slow
def test_random_weights_are_made_on_a_mesh() -> None:
    tree, mesh_shape = MODEL.params(), {"fsdp": 2, "tensor": 2}
    shardings = params.shardings(tree, make_mesh(mesh_shape))
    sharded = params.initialize(tree, jax.random.key(0), "float32", shardings)
    assert_same_model(sharded, params.initialize(tree, jax.random.key(0), "float32"), mesh_shape)


def test_experts_lie_on_several_devices() -> None:
    hf = HF | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    }
    model, mesh = resolve(hf), make_mesh({"expert": 2, "tensor": 2})
    tree = model.params()
    shardings = params.shardings(tree, mesh)
    single = params.initialize(tree, jax.random.key(1), "float32")
    sharded = jax.device_put(single, shardings)
    assert sharded["layers"][0]["gate"].addressable_shards[0].data.shape == (3, 24, 20)
    assert set(bytes_per_device(sharded).values()) == {params.device_nbytes(tree, "float32", mesh)}

    @jax.jit
    def forward(weights: Tree) -> jax.Array:
        attend = packed_attend(jnp.zeros((1, len(TOKENS)), jnp.int32))
        return model.logits(weights, model.forward(weights, TOKENS, jnp.arange(len(TOKENS)), attend)[0])

    np.testing.assert_allclose(forward(sharded), forward(single), atol=1e-5, rtol=0)
