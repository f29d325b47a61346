"""How the rows and tokens of a training step lie on a mesh, and the hints that tell the compiler so.

Rows are spread over "data", "fsdp" and "expert", and the tokens of a row over "context". Models flatten rows to packed
tokens: here with the shares of the context first, so that the tokens of a device are neighbours in the flat dim too.

A causal query has more to see the later it comes. So a row is cut into two chunks for each device of the context, and
device c holds chunks c and 2C - 1 - c ("zig-zag"): all have equally much to do.

Dims: R rows, L tokens of a row, C devices of the context; T = R · L.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from tenfold.base.errors import ConfigError
from tenfold.parallel.mesh import ROW_AXES


@dataclass(frozen=True)
class Layout:
    """Where a step's activations lie: nowhere in particular without a mesh."""

    mesh: Mesh | AbstractMesh | None = None

    def size(self, *axes: str) -> int:
        """How many devices the mesh has along these axes, of those that it has."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape.get(axis, 1) for axis in axes)

    @property
    def context(self) -> int:
        """Into how many shares the tokens of a row are split."""
        return self.size("context")

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes of the mesh that rows are spread over."""
        return () if self.mesh is None else tuple(axis for axis in ROW_AXES if axis in self.mesh.shape)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes that flat tokens are spread over."""
        return (("context",) if self.context > 1 else ()) + self.row_axes

    @property
    def rows(self) -> NamedSharding:
        """Where a batch of rows [R, ...] lies: whole rows, since cutting them reorders their tokens."""
        if self.mesh is None:
            raise ConfigError("a batch has no sharding without a mesh")
        return NamedSharding(self.mesh, PartitionSpec(self.row_axes))

    @cached_property
    def row_shares(self) -> tuple[int, ...]:
        """Of each process, which share of a batch's rows its devices hold; shares are counted from 0.

        Processes whose devices hold the same rows, such as the stages of a pipeline, have the same share.

        Raises ConfigError if there are several processes and the mesh does not have all of their devices, or if some of
        their rows, but not all, are the same.
        """
        count, ways = jax.process_count(), self.size(*self.row_axes)
        if count == 1:
            return (0,)
        if self.mesh is None or self.mesh.size < jax.device_count():
            raise ConfigError(
                f"{count} processes have {jax.device_count()} devices, and a run takes all of them: name a mesh of as "
                f"many, such as --mesh data={jax.device_count()}"
            )
        held: list[set[int]] = [set() for _ in range(count)]
        for device, (rows, *_) in self.rows.devices_indices_map((ways,)).items():
            held[device.process_index].add(rows.start or 0)
        shares = sorted({tuple(sorted(rows)) for rows in held})
        if len(shares) * len(shares[0]) != ways or len({len(share) for share in shares}) > 1:
            spread = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
            raise ConfigError(
                f"the mesh {spread} lies over {count} processes so that some have a part of their rows in common: "
                "make sizes of axes multiples of a process's devices, or divisors"
            )
        return tuple(shares.index(tuple(sorted(rows))) for rows in held)

    @property
    def row_share(self) -> tuple[int, int]:
        """Which share of a batch's rows this process has to read, and how many there are. Raises as `row_shares`."""
        return self.row_shares[jax.process_index()], max(self.row_shares) + 1

    def check(self, rows: int, length: int, micro_batches: int = 1) -> None:
        """Raises ConfigError, saying what to change, unless batches of this shape divide over the mesh and hosts."""
        _, shares = self.row_share
        ways = self.size(*self.row_axes) * micro_batches  # a multiple of the shares
        if rows % ways:
            spread = " · ".join(f"{axis}={self.size(axis)}" for axis in self.row_axes) or "one device"
            spread += f" on {shares} hosts" if shares > 1 else ""
            raise ConfigError(
                f"{rows} rows of a batch do not divide over {spread} and {micro_batches} micro-batches: "
                f"make them a multiple of {ways}"
            )
        if self.context > 1 and length % (2 * self.context):
            raise ConfigError(
                f"rows of {length} tokens do not divide over context={self.context}: make their length a multiple of "
                f"{2 * self.context}, two chunks for each device"
            )

    def flatten(self, x: jax.Array) -> jax.Array:
        """[R, L, ...] as the flat tokens that models take [T, ...]."""
        C, (R, L, *dims) = self.context, x.shape
        if C > 1:
            order = np.stack([np.arange(C), 2 * C - 1 - np.arange(C)], axis=1)
            x = x.reshape(R, 2 * C, L // (2 * C), *dims)[:, order]  # R, C, 2, L / 2C
            x = jnp.moveaxis(x, 1, 0)
        return self.constrain(x.reshape(R * L, *dims), self.token_axes)

    def unflatten(self, x: jax.Array, rows: int) -> jax.Array:
        """Flat tokens [T, ...] as rows [R, L, ...]; each whole on its devices, so shares of a context are gathered."""
        C, (T, *dims) = self.context, x.shape
        if C > 1:
            x = jnp.moveaxis(x.reshape(C, rows, 2, -1, *dims), 0, 1)  # R, C, 2, L / 2C
            halves = x[:, :, 0], x[:, ::-1, 1]
            x = jnp.concatenate(halves, axis=1)
        return self.constrain(x.reshape(rows, T // rows, *dims), self.row_axes)

    def shares(self, x: jax.Array, rows: int) -> jax.Array:
        """Flat tokens as [C, R, L / C, ...], of which each device of the context has the first index of its own."""
        x = x.reshape(self.context, rows, -1, *x.shape[1:])
        return self.constrain(x, "context", self.row_axes)

    def constrain(self, x: jax.Array, *dims: str | Sequence[str] | None) -> jax.Array:
        """`x` with its leading dims spread over these axes; the compiler chooses for the others."""
        if self.mesh is None:
            return x
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(dims))
        spec = PartitionSpec(
            *(dim if dim is None or isinstance(dim, str) else tuple(dim) or None for dim in dims), *free
        )
        return jax.lax.with_sharding_constraint(x, NamedSharding(current(self.mesh), spec))


NOWHERE = Layout()


def current(mesh: Mesh | AbstractMesh) -> Mesh | AbstractMesh:
    """The mesh as it is seen here: within a `shard_map` some of its axes are no longer the compiler's."""
    seen = jax.sharding.get_abstract_mesh()
    return mesh if seen.empty else seen
