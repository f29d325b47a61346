"""Rules that map logical axes to mesh axes."""

import dataclasses
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tenfold.base.errors import ConfigError
from tenfold.parallel.sharding import DEFAULT_RULES, ShardingRules, make_mesh, named_sharding, partition_spec

MESH = make_mesh({"fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        ("embed heads head_dim", (8, 4, 16), P("fsdp", "tensor", None)),
        ("embed kv_heads head_dim", (8, 1, 16), P("fsdp", None, None)),  # one head cannot be split
        ("vocab embed", (10, 7), P("tensor", None)),
        ("mlp embed", (6, 8), P("tensor", "fsdp")),
        ("layers embed mlp", (3, 8, 6), P(None, "fsdp", "tensor")),
        ("embed", (8,), P("fsdp")),
    ],
)
def test_default_rules(axes: str, shape: tuple[int, ...], spec: P) -> None:
    assert partition_spec(axes, shape, DEFAULT_RULES, MESH) == spec


def test_a_rule_may_name_several_mesh_axes() -> None:
    rules = ShardingRules(vocab=("tensor", "fsdp"), embed=None)
    assert partition_spec("vocab embed", (8, 8), rules, MESH) == P(("tensor", "fsdp"), None)
    assert partition_spec("vocab embed", (6, 8), rules, MESH) == P(None, None)  # 4 does not divide 6


def test_mesh_axes_that_a_mesh_lacks_split_nothing() -> None:
    mesh = make_mesh({"tensor": 4})
    assert partition_spec("embed mlp", (8, 8), DEFAULT_RULES, mesh) == P(None, "tensor")
    rules = ShardingRules(mlp=("expert", "tensor"))
    assert partition_spec("embed mlp", (8, 8), rules, mesh) == P(None, "tensor")


def test_a_mesh_axis_cannot_split_two_dims() -> None:
    with pytest.raises(ConfigError, match="split both 'embed' and 'mlp' .* over the mesh axis 'tensor'"):
        partition_spec("embed mlp", (7, 8), ShardingRules(embed="tensor"), MESH)


def test_unknown_logical_axes_are_named() -> None:
    with pytest.raises(ConfigError, match="no axis 'depth'; known: embed, heads"):
        partition_spec("depth embed", (2, 2), DEFAULT_RULES, MESH)


def test_a_mesh_uses_the_first_devices() -> None:
    assert MESH.shape == {"fsdp": 2, "tensor": 2}
    assert list(make_mesh({"tensor": 2}).devices.flat) == jax.devices()[:2]
    assert list(make_mesh({"tensor": 1}, jax.devices()[2:]).devices.flat) == jax.devices()[2:3]
    for shape in ({"tensor": len(jax.devices()) + 1}, {"tensor": 0}):
        with pytest.raises(ConfigError, match="a mesh of .* needs"):
            make_mesh(shape)


NAMES = st.sampled_from(["embed", "heads", "kv_heads", "head_dim", "mlp", "vocab", "layers"])
RULES = st.dictionaries(NAMES, st.sampled_from([None, "tensor", "fsdp", ("fsdp", "tensor")]))


@given(changes=RULES, dims=st.lists(st.tuples(NAMES, st.integers(1, 12)), min_size=1, max_size=4))
def test_every_spec_can_be_laid_out(changes: dict[str, Any], dims: list[tuple[str, int]]) -> None:
    rules = dataclasses.replace(DEFAULT_RULES, **changes)
    axes, shape = " ".join(name for name, _ in dims), tuple(length for _, length in dims)
    try:
        sharding = named_sharding(axes, shape, MESH, rules)
    except ConfigError:
        wanted = [getattr(rules, name) for name, _ in dims]
        used = [axis for rule in wanted for axis in ((rule,) if isinstance(rule, str) else rule or ())]
        assert len(set(used)) < len(used)
        return
    shard = sharding.shard_shape(shape)
    for rule, length, part in zip([getattr(rules, name) for name, _ in dims], shape, shard, strict=True):
        ways = {None: 1, "pipeline": 1, "tensor": 2, "fsdp": 2, ("fsdp", "tensor"): 4}[rule]
        assert part == (length // ways if length % ways == 0 else length)


def test_rules_are_replaced_field_by_field() -> None:
    rules = dataclasses.replace(DEFAULT_RULES, embed=None)
    assert partition_spec("embed mlp", (8, 8), rules, MESH) == P(None, "tensor")
