"""Fingerprints of arrays: what changes them, and what does not. Restoring is shown in `test_trainer`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import NamedSharding, PartitionSpec

from tenfold.base.errors import ConfigError
from tenfold.parallel.sharding import make_mesh
from tenfold.train.checkpoints import CheckpointConfig, fingerprints, gather

SHAPE = (4, 8)


def by_hand(x: np.ndarray) -> int:
    """The sum over places of bits · (2 · place + 1) · 2654435761, modulo 2³²."""
    bits = x.reshape(-1).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.itemsize])
    return sum(int(b) * (2 * i + 1) * 2654435761 for i, b in enumerate(bits)) % 2**32


@given(arrays.arrays(np.float32, SHAPE), st.integers(0, 31), st.integers(0, 31))
def test_any_flipped_bit_shows(x: np.ndarray, place: int, bit: int) -> None:
    changed = x.copy()
    changed.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
    found, other = (fingerprints({"x": jnp.asarray(each)})["['x']"] for each in (x, changed))
    assert found == by_hand(x)
    assert other != found


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int32"])
def test_other_dtypes(dtype: str) -> None:
    x = jnp.arange(32).astype(dtype).reshape(SHAPE)
    assert fingerprints([x]) == {"[0]": by_hand(np.asarray(x))}


def test_a_mesh_changes_nothing_and_an_order_does() -> None:
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    spread = jax.device_put(x, NamedSharding(make_mesh({"fsdp": 2, "tensor": 2}), PartitionSpec("fsdp", "tensor")))
    assert fingerprints([spread]) == fingerprints([jnp.asarray(x)])
    assert fingerprints([jnp.asarray(x[::-1])]) != fingerprints([jnp.asarray(x)])


def test_one_process_gathers_what_it_has() -> None:
    assert gather(b"{}") == [b"{}"]


def test_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        CheckpointConfig(save_steps=0)
