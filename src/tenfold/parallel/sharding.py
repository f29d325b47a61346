"""From the logical axes of a weight to the axes of a device mesh, by a table that can be replaced.

An "axis" is the mesh's, a "dim" the array's; a dim's logical axis is the name that its declaration gives it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tenfold.base.errors import ConfigError

MeshAxes = str | tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """The mesh axis, or axes, over which each logical axis is split; None, or an axis that the mesh lacks, splits none.

    The defaults are tensor parallelism (Shoeybi et al., 2019) over "tensor", fully sharded weights (Zhao et al., 2023)
    over "fsdp", expert parallelism (Lepikhin et al., 2020) over "expert", and stacked layers over the stages of a
    "pipeline" (Huang et al., 2019). "small" are dims that nobody would split: the parts of a fused tensor,
    coefficients, scalars.
    """

    embed: MeshAxes = "fsdp"
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    mlp: MeshAxes = "tensor"
    gates: MeshAxes = None
    experts: MeshAxes = "expert"
    vocab: MeshAxes = "tensor"
    positions: MeshAxes = None
    small: MeshAxes = None
    latent: MeshAxes = None
    layers: MeshAxes = "pipeline"


DEFAULT_RULES = ShardingRules()

_LOGICAL_AXES = tuple(field.name for field in fields(ShardingRules))


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the given axis sizes, e.g. {"fsdp": 2, "tensor": 4}, whose programs the compiler partitions.

    Args:
        shape: size of each mesh axis, the slowest varying first.
        devices: at least as many as the mesh has places, of which the first are used; None means all.

    Raises:
        ConfigError: if there are too few devices, or a size is not positive.
    """
    devices = jax.devices() if devices is None else devices
    size = math.prod(shape.values())
    if min(shape.values(), default=1) < 1 or size > len(devices):
        raise ConfigError(f"a mesh of {dict(shape)} needs {size} devices, of which there are {len(devices)}")
    return jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape), devices=devices[:size]
    )


def partition_spec(axes: str, shape: Sequence[int], rules: ShardingRules, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The mesh axes of every dim of an array. A dim that its mesh axes do not divide stays whole.

    Args:
        axes: the logical axis of every dim, e.g. "embed heads head_dim".
        shape: the array's.
        rules: the table.
        mesh: where the array will lie.

    Raises:
        ConfigError: for an unknown logical axis, or if two dims would be split over the same mesh axis.
    """
    spec: list[MeshAxes] = []
    used: dict[str, str] = {}
    for logical, length in zip(axes.split(), shape, strict=True):
        if logical not in _LOGICAL_AXES:
            raise ConfigError(f"the sharding rules have no axis {logical!r}; known: {', '.join(_LOGICAL_AXES)}")
        rule = getattr(rules, logical)
        wanted = tuple(axis for axis in ((rule,) if isinstance(rule, str) else rule or ()) if axis in mesh.shape)
        for axis in wanted:
            if axis in used:
                raise ConfigError(
                    f"the sharding rules split both {used[axis]!r} and {logical!r} of a weight with the axes {axes!r} "
                    f"over the mesh axis {axis!r}; give one of them another, or None"
                )
            used[axis] = logical
        divides = length % math.prod(mesh.shape[axis] for axis in wanted) == 0
        spec.append(None if not wanted or not divides else wanted[0] if len(wanted) == 1 else wanted)
    return PartitionSpec(*spec)


def named_sharding(
    axes: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: ShardingRules = DEFAULT_RULES
) -> NamedSharding:
    """`partition_spec` bound to its mesh."""
    return NamedSharding(mesh, partition_spec(axes, shape, rules, mesh))
