"""Declarations: what is refused, how weights start, what they take, and that stacking changes nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.base.errors import ConfigError
from tenfold.nn import param as params
from tenfold.nn.param import Param, Source, param
from tenfold.nn.stack import stack_layers
from tenfold.parallel.sharding import ShardingRules, make_mesh

KEY = jax.random.key(0)


def layer(i: int, *, heads: int = 2) -> dict[str, Param]:
    at = f"model.layers.{i}"
    return {
        "q": param((6, heads, 4), "embed heads head_dim", f"{at}.q.weight", "(H K) D -> D H K"),
        "gate": param((6, 8), "embed mlp", f"{at}.gate_up.weight", "F D -> D F", rows=(0, 8), scale=0.5),
        "up": param((6, 8), "embed mlp", f"{at}.gate_up.weight", "F D -> D F", rows=(8, 16), scale=0.5),
        "norm": param((6,), "embed", f"{at}.norm.weight", init="ones"),
        "bias": param((8,), "mlp", f"{at}.bias", init="zeros"),
    }


def tree(num_layers: int) -> dict:
    return {
        "embed": param((10, 6), "vocab embed", "embed.weight", aliases=("head.weight",)),
        "layers": [layer(i) for i in range(num_layers)],
    }


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"axes": "embed"}, "do not name the dims"),
        ({"axes": "layers embed"}, "1 sources for the shape"),
        ({"axes": "experts embed", "stack_dims": 1}, r"1 sources for the shape \(4, 3\), of which 1 dims are stacked"),
        ({"sources": (Source(name="w", layout="A B C -> C B A"),)}, "is not a bijection"),
        ({"sources": (Source(name="w", rows=(4, 6)),)}, r"rows \(4, 6\) do not hold"),
        ({"sources": (Source(name="w", layout="B A -> A B", rows=(4, 9)),)}, r"rows \(4, 9\) do not hold"),
    ],
)
def test_a_wrong_declaration_is_refused(wrong: dict, message: str) -> None:
    right = {"shape": (4, 3), "axes": "embed mlp", "sources": (Source(name="w"),)}
    Param(**right)
    with pytest.raises(ValueError, match=message):
        Param(**right | wrong)


def test_sizes_add_up() -> None:
    weights = 10 * 6 + 3 * (6 * 2 * 4 + 2 * 6 * 8 + 6 + 8)
    assert params.count(tree(3)) == weights
    assert params.nbytes(tree(3), jnp.bfloat16) == 2 * weights
    assert params.nbytes(tree(3), jnp.float32) == 4 * weights


def test_leaves_have_paths() -> None:
    paths = dict(params.leaves(tree(2)))
    assert paths["layers.1.norm"].sources[0].name == "model.layers.1.norm.weight"
    assert len(paths) == 1 + 2 * 5


def test_abstract_is_what_initialize_makes() -> None:
    made = params.initialize(tree(2), KEY, jnp.bfloat16)
    promised = params.abstract(tree(2), jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), promised)


def test_initial_distributions() -> None:
    made = params.initialize(
        {"big": param((256, 256), "embed mlp", "w", scale=0.02), "layer": layer(0)}, KEY, "float32"
    )
    big = np.asarray(made["big"])
    n = math.sqrt(big.size)
    assert abs(big.mean()) < 5 * 0.02 / n
    assert big.std() == pytest.approx(0.02, rel=5 / n)
    assert (np.abs(big) > 2 * 0.02).mean() == pytest.approx(0.0455, abs=0.005)  # of a normal distribution
    assert (np.asarray(made["layer"]["norm"]) == 1).all()
    assert (np.asarray(made["layer"]["bias"]) == 0).all()


def test_every_weight_starts_differently_and_the_key_decides() -> None:
    first, again, other = (params.initialize(tree(2), jax.random.key(k), "float32") for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    layers = first["layers"]
    assert not np.array_equal(layers[0]["q"], layers[1]["q"])
    assert not np.array_equal(layers[0]["gate"], layers[0]["up"])
    assert not np.array_equal(first["embed"], other["embed"])


def test_stacked_and_unstacked_start_equal() -> None:
    plain, kinds = tree(5), (0, 1, 0, 1, 0)
    stacked = stack_layers(plain["layers"], kinds)
    a = params.initialize(plain["layers"], KEY, "float32")
    b = params.initialize(stacked, KEY, "float32")
    assert params.count(stacked) == params.count(plain["layers"])
    for i in range(4):
        jax.tree.map(np.testing.assert_array_equal, a[i], jax.tree.map(lambda x, i=i: x[i // 2], b["scan"][i % 2]))
    jax.tree.map(np.testing.assert_array_equal, a[4], b["tail"][0])


def test_a_stack_names_its_layers() -> None:
    stacked = params.stack([layer(i)["q"] for i in range(3)])
    assert stacked.stacked
    assert stacked.shape == (3, 6, 2, 4)
    assert stacked.source_shape == (6, 2, 4)
    assert stacked.stack_shape == (3,)
    assert stacked.axes == "layers embed heads head_dim"
    assert [source.name for source in stacked.sources] == [f"model.layers.{i}.q.weight" for i in range(3)]


def test_shardings_follow_the_rules_and_shrink_what_a_device_holds() -> None:
    mesh = make_mesh({"tensor": 2})
    made = params.initialize(tree(2), KEY, "float32", params.shardings(tree(2), mesh))
    jax.tree.map(np.testing.assert_array_equal, made, params.initialize(tree(2), KEY, "float32"))
    shards = jax.tree.map(
        lambda x: x.addressable_shards[0].data.shape, made, is_leaf=lambda x: isinstance(x, jax.Array)
    )
    assert shards["embed"] == (5, 6)
    assert shards["layers"][0] == {"q": (6, 1, 4), "gate": (6, 4), "up": (6, 4), "norm": (6,), "bias": (4,)}


def test_a_stack_is_sharded_like_its_layers() -> None:
    mesh = make_mesh({"tensor": 2})
    stacked = params.stack([layer(i)["q"] for i in range(3)])
    assert params.shardings(stacked, mesh).spec == jax.sharding.PartitionSpec(None, None, "tensor", None)


def test_rules_that_do_not_fit_a_declaration_are_refused() -> None:
    with pytest.raises(ConfigError, match="split both 'embed' and '(heads|mlp)'"):
        params.shardings(layer(0), make_mesh({"tensor": 2}), ShardingRules(embed="tensor"))
