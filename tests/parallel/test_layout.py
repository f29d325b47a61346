"""Rows and tokens on meshes: an order that can be undone, and neighbours that lie on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.base.errors import ConfigError
from tenfold.parallel.layout import NOWHERE, Layout
from tenfold.parallel.sharding import make_mesh


@pytest.mark.parametrize(("context", "rows", "chunk", "dims"), [(1, 3, 2, 1), (2, 1, 3, 0), (4, 3, 2, 1)])
def test_flattening_can_be_undone(context: int, rows: int, chunk: int, dims: int) -> None:
    layout = Layout(make_mesh({"context": context}))
    x = jnp.arange(rows * 2 * context * chunk * 2**dims).reshape(rows, -1, *(2,) * dims)
    flat = jax.jit(layout.flatten)(x)
    assert sorted(flat.reshape(-1).tolist()) == list(range(x.size))
    np.testing.assert_array_equal(jax.jit(layout.unflatten, static_argnums=1)(flat, rows), x)


def test_a_device_of_the_context_has_an_early_and_a_late_chunk_of_every_row() -> None:
    layout = Layout(make_mesh({"context": 4}))
    at = jnp.broadcast_to(jnp.arange(16), (3, 16))
    shares = layout.flatten(at).reshape(4, 3, 4)
    for c, (early, late) in enumerate([([0, 1], [14, 15]), ([2, 3], [12, 13]), ([4, 5], [10, 11]), ([6, 7], [8, 9])]):
        np.testing.assert_array_equal(shares[c], [early + late] * 3)


def test_each_device_holds_the_tokens_of_its_rows() -> None:
    layout = Layout(make_mesh({"fsdp": 2, "context": 2}))
    flat = jax.jit(layout.flatten)(jnp.arange(32).reshape(4, 8))
    shards = {shard.device.id: shard.data.tolist() for shard in flat.addressable_shards}
    assert shards[0] == [0, 1, 6, 7, 8, 9, 14, 15]  # rows 0 and 1, the first and the last chunk
    assert shards[3] == [18, 19, 20, 21, 26, 27, 28, 29]  # rows 2 and 3, those between


def test_without_a_mesh_rows_are_end_to_end() -> None:
    assert NOWHERE.flatten(jnp.arange(6).reshape(2, 3)).tolist() == list(range(6))
    with pytest.raises(ConfigError, match="without a mesh"):
        _ = NOWHERE.rows


def test_what_does_not_divide_is_said() -> None:
    layout = Layout(make_mesh({"data": 2, "context": 2}))
    layout.check(8, 12, micro_batches=4)
    with pytest.raises(ConfigError, match="6 rows of a batch do not divide over data=2 and 2 micro-batches: .* of 4"):
        layout.check(6, 12, micro_batches=2)
    with pytest.raises(ConfigError, match="rows of 10 tokens do not divide over context=2: .* multiple of 4"):
        layout.check(8, 10)
