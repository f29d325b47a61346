"""Meshes as users name them."""

import pytest

from tenfold.base.errors import ConfigError
from tenfold.parallel.mesh import AXES, parse_mesh


def test_axes_come_in_the_order_of_their_traffic() -> None:
    assert list(parse_mesh("tensor=2, data=2,pipeline=2,fsdp=4").items()) == [
        ("pipeline", 2),
        ("data", 2),
        ("fsdp", 4),
        ("tensor", 2),
    ]
    assert tuple(parse_mesh(",".join(f"{axis}=1" for axis in sorted(AXES)))) == AXES
    assert parse_mesh("") == {}


def test_one_size_may_be_what_is_left() -> None:
    assert parse_mesh("tensor=2,fsdp=-1", 8) == {"fsdp": 4, "tensor": 2}
    assert parse_mesh("data=-1", 1) == {"data": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "names the axis 'model'; the axes are context, data, expert, fsdp, pipeline, tensor"),
        ("data=2,data=2", "names the axis 'data' twice"),
        ("data", "gives 'data' the size ''; write a number, as in data=2"),
        ("data=two", "gives 'data' the size 'two'"),
        ("data=0", "gives 'data' the size '0'"),
        ("data=-2", "gives 'data' the size '-2'"),
        ("data=3", "has 3 places, which do not divide 8 devices"),
        ("data=16", "has 16 places, which do not divide 8 devices"),
        ("data=3,fsdp=-1", "has 6 places, which do not divide 8 devices"),
        ("data=-1,fsdp=-1", "may have one size of -1"),
    ],
)
def test_what_is_wrong_with_a_mesh_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_mesh(text, 8)


def test_the_rest_needs_the_number_of_devices() -> None:
    with pytest.raises(ConfigError, match="say how many devices there are"):
        parse_mesh("data=-1")
