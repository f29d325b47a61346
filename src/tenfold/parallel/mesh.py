"""Meshes as a user names them: "data=2,fsdp=4,tensor=2,pipeline=2".

The axes of a mesh are always in one order, the most talkative last, because neighbouring devices have the fastest
links: "tensor" exchanges activations within every layer, "context" keys and values, "expert" tokens, "fsdp" and "data"
weights and gradients, and "pipeline" one activation between stages.
"""

import math

from tenfold.base.errors import ConfigError

AXES = ("pipeline", "data", "fsdp", "expert", "context", "tensor")
ROW_AXES = ("data", "fsdp", "expert")  # what rows are spread over: every device of these computes rows of its own


def parse_mesh(text: str, num_devices: int | None = None) -> dict[str, int]:
    """The axis sizes that a text such as "fsdp=4,tensor=2" names, in the order of `AXES`; "" names one device.

    Args:
        text: axes and sizes. One size may be -1: all the devices that the others leave.
        num_devices: how many there are, for a size of -1 and to check the others; None checks nothing.

    Raises:
        ConfigError: for an axis that is unknown or named twice, a size that is not a number, or sizes that do not
            divide the devices.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise ConfigError(f"the mesh {text!r} names the axis {name!r}; the axes are {', '.join(sorted(AXES))}")
        if name in sizes:
            raise ConfigError(f"the mesh {text!r} names the axis {name!r} twice")
        if not size.removeprefix("-").isdecimal() or (int(size) < 1 and int(size) != -1):
            raise ConfigError(f"the mesh {text!r} gives {name!r} the size {size!r}; write a number, as in {name}=2")
        sizes[name] = int(size)
    sizes = _with_rest(text, sizes, num_devices)
    if num_devices is not None and num_devices % math.prod(sizes.values()):
        raise ConfigError(
            f"the mesh {text!r} has {math.prod(sizes.values())} places, which do not divide {num_devices} devices"
        )
    return {axis: sizes[axis] for axis in AXES if axis in sizes}


def _with_rest(text: str, sizes: dict[str, int], num_devices: int | None) -> dict[str, int]:
    """The sizes with what is left in place of -1."""
    rest = [axis for axis, size in sizes.items() if size == -1]
    if not rest:
        return sizes
    if len(rest) > 1 or num_devices is None:
        reason = "may have one size of -1" if len(rest) > 1 else "has a size of -1: say how many devices there are"
        raise ConfigError(f"the mesh {text!r} {reason}")
    return sizes | {rest[0]: max(1, num_devices // -math.prod(sizes.values()))}
