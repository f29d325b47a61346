"""Collectives are read from a program's text, in each of the ways that XLA writes which devices take part."""

import pytest

from tenfold.base.errors import TenfoldError
from tenfold.parallel.collectives import Collective, collectives

MESH = {"fsdp": 2, "context": 2, "tensor": 2}  # device 4 f + 2 c + t


def program(groups: str) -> str:
    return f"""ENTRY %main (x: f32[32]) -> f32[32] {{
  %x = f32[32]{{0}} parameter(0)
  ROOT %sum = f32[32]{{0}} all-reduce(%x), channel_id=1, {groups}, use_global_device_ids=true, to_apply=%add
}}"""


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("fsdp",)),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("context",)),
        ("replica_groups=[2,4]<=[2,4]T(0,1)", ("context", "tensor")),
        ("replica_groups=mesh['a'=4,'b'=2] {'b'}", ("tensor",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", ("fsdp", "context")),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", ("fsdp",)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2,'b'}", ("context", "tensor")),
        # Devices in another order: the context varies slowest.
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(1,0,2)) {'b'}", ("tensor",)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(1,0,2)) {'a':(1)2}", ("context",)),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(1,0,2)) {'a':(2)2,'b'}", ("fsdp", "tensor")),
    ],
)
def test_axes_are_those_that_a_group_s_devices_differ_in(groups: str, axes: tuple[str, ...]) -> None:
    assert collectives(program(groups), MESH) == [Collective("all-reduce", axes, 128, 1)]


def test_an_unknown_way_is_named() -> None:
    with pytest.raises(TenfoldError, match="in an unknown way: ROOT %sum"):
        collectives(program("replica_groups=all"), MESH)
