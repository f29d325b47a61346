"""What a compiled program sends between devices, read from its text: which collectives, along which axes, how much.

A collective in a loop counts as often as the loop runs, and one in a branch as often as the branch is taken, which the
text does not say: that is given.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tenfold.base.errors import TenfoldError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_PAIRS = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_COUNTED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))? \{([^}]*)\}")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One operation of a program.

    Attributes:
        kind: of `KINDS`.
        axes: of the mesh, along which it goes.
        nbytes: of its result, on one device.
        times: how often it runs.
    """

    kind: str
    axes: tuple[str, ...]
    nbytes: int
    times: float


def collectives(hlo: str, mesh: Mapping[str, int], branches: Sequence[float] | None = None) -> list[Collective]:
    """The collectives of a program that was compiled for a mesh.

    Args:
        hlo: its text.
        mesh: the mesh's axis sizes, the slowest varying first, whose devices are numbered in that order.
        branches: how often each branch is taken, of a choice between as many; of any other every branch counts once.
    """
    bodies = _computations(hlo)
    times = _multiplicities(bodies, branches)
    found: list[Collective] = []
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match and times[name]:
                axes = _axes(_first_group(line), mesh)
                found.append(Collective(match[2], axes, _nbytes(match[1]), times[name]))
    return found


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation, the program's own under "ENTRY"."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            lines = bodies["ENTRY" if header[1] else header[2]] = []
        else:
            lines.append(line)
    return bodies


def _multiplicities(bodies: dict[str, list[str]], branches: Sequence[float] | None) -> Counter[str]:
    """How often each computation runs."""
    times: Counter[str] = Counter()

    def visit(name: str, factor: float) -> None:
        times[name] += factor  # pyright: ignore[reportArgumentType] -- counts may be fractions
        for line in bodies.get(name, ()):
            for called, share in _calls(line, branches):
                visit(called, factor * share)

    visit("ENTRY", 1)
    return times


def _calls(line: str, branches: Sequence[float] | None) -> Iterator[tuple[str, float]]:
    """The computations that a line runs, and how often."""
    trips = _TRIPS.search(line)
    for name in _CALLED.findall(line):
        yield name, int(trips[1]) if trips else 1
    choice = _BRANCHES.search(line)
    if choice:
        names = re.findall(r"[\w.\-]+", choice[1]) if choice[1] else [choice[2], choice[3]]
        known = branches is not None and len(branches) == len(names)
        yield from zip(names, branches if branches is not None and known else [1] * len(names), strict=True)


def _nbytes(shapes: str) -> int:
    """The bytes of a type such as "(f32[4,16], bf16[8])"."""

    def itemsize(dtype: str) -> int:
        bits = re.search(r"\d+", dtype)
        return max(1, int(bits[0]) // 8) if bits else 1

    return sum(
        math.prod(int(n) for n in dims.split(",") if n) * itemsize(dtype) for dtype, dims in _SHAPE.findall(shapes)
    )


def _first_group(line: str) -> list[int]:
    """The devices of a collective's first group, or the first pair that it connects; XLA has three ways to write them:
    {{0,2},{1,3}}, [2,2]<=[2,2]T(1,0), and mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, perhaps without ids."""
    if match := _PAIRS.search(line):
        return [int(n) for n in match[1].split(",")]
    if match := _COUNTED.search(line):
        shape, dims, order = (tuple(map(int, text.split(","))) if text else None for text in match.groups())
        assert shape is not None and dims is not None
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)[0].tolist()
    if match := _NAMED.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        grouped = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[4])
        ids = np.arange(math.prod(sizes.values()))
        if match[2]:
            dims, order = (tuple(map(int, text.split(","))) for text in match.group(2, 3))
            ids = ids.reshape(dims).transpose(order)
        ids = ids.reshape(tuple(sizes.values()))
        for name, before, size in grouped:  # of some axes only a part: so many neighbours, after so many before them
            dim = list(sizes).index(name)
            step = sizes[name] // (int(before) * int(size)) if before else 1
            ids = np.take(ids, np.arange(int(size) if before else sizes[name]) * step, axis=dim)
        kept = {name for name, *_ in grouped}
        return ids[tuple(slice(None) if name in kept else 0 for name in sizes)].reshape(-1).tolist()
    raise TenfoldError(f"a collective whose groups are written in an unknown way: {line.strip()[:300]}")


def _axes(devices: Sequence[int], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which devices differ."""
    places = np.stack(np.unravel_index(np.asarray(devices), tuple(mesh.values())))
    return tuple(axis for axis, along in zip(mesh, places, strict=True) if (along != along[0]).any())
