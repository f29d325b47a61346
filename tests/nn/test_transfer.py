"""Weights arrive whole, in the right order and dtype, by every route and on every device."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tenfold.nn import transfer
from tenfold.parallel.sharding import make_mesh

ROUTES = {"small": (2**20, 2**20), "whole": (0, 2**20), "in blocks": (0, 40)}
SHAPE = (4, 6, 2)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The three ways by which an array may travel, chosen by its size."""
    small, block = ROUTES[request.param]
    monkeypatch.setattr(transfer, "_SMALL", small)
    monkeypatch.setattr(transfer, "_BLOCK", block)
    return request.param


def stored(dtype: str, seed: int = 0) -> np.ndarray:
    """A view with our dims of an array that lies otherwise in memory, as checkpoints do."""
    values = np.random.default_rng(seed).normal(size=(SHAPE[1], SHAPE[2], SHAPE[0]))
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("source", "dtype"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "bfloat16")]
)
def test_values_and_dtype(route: str, source: str, dtype: str) -> None:
    view = stored(source)
    released: list[int] = []
    placed = transfer.place([view], dtype, release=lambda part: released.append(part.size))
    assert placed.dtype == dtype
    assert isinstance(placed, jax.Array)
    np.testing.assert_array_equal(np.asarray(placed), view.astype(np.float32).astype(placed.dtype))
    assert sum(released) == view.size
    assert len(released) > 1 if route == "in blocks" else len(released) == 1


def test_layers_are_stacked(route: str) -> None:
    views = [stored("float32", seed) for seed in range(3)]
    placed = transfer.place(views, "float32", stack_shape=(len(views),))
    np.testing.assert_array_equal(np.asarray(placed), np.stack(views))


@pytest.mark.parametrize("spec", [P("x", None, None), P(None, ("x", "y"), None), P(None, "y", "x"), P()])
def test_each_device_gets_its_shard(route: str, spec: P) -> None:
    view = stored("float32").repeat(2, axis=1)
    sharding = NamedSharding(make_mesh({"x": 2, "y": 2}), spec)
    placed = transfer.place([view], "float32", sharding=sharding)
    assert placed.sharding == sharding
    np.testing.assert_array_equal(np.asarray(placed), view)
    for shard in placed.addressable_shards:
        assert shard.data.shape == sharding.shard_shape(view.shape)
        np.testing.assert_array_equal(np.asarray(shard.data), view[shard.index])


def test_stacks_are_sharded(route: str) -> None:
    views = [stored("float32", seed) for seed in range(2)]
    sharding = NamedSharding(make_mesh({"x": 2, "y": 2}), P("x", "y"))
    placed = transfer.place(views, "float32", stack_shape=(len(views),), sharding=sharding)
    np.testing.assert_array_equal(np.asarray(placed), np.stack(views))


def test_the_result_shares_no_memory_with_its_source(route: str) -> None:
    view = np.ones((64, 64), np.float32)
    placed = transfer.place([view], "float32")
    view[:] = 2
    assert (np.asarray(placed) == 1).all()


def test_scalars_and_empty_arrays(route: str) -> None:
    assert transfer.place([np.full((), 3, np.float32)], "float32") == 3
    assert transfer.place([np.ones((0, 3))], "float32").shape == (0, 3)


MEASURE = """
import sys
from pathlib import Path
import jax
from tenfold.nn import safetensors, transfer

def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

transfer._BLOCK = 8 * 2**20
file = safetensors.open(Path(sys.argv[1]))
jax.block_until_ready(jax.jit(lambda x: x.T + 1)(jax.numpy.ones((8, 8))))
before = peak()
array = transfer.place([file["x"].T], "float32", release=file.release)
print(peak() - before, array.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's process accounting")
def test_host_memory_stays_close_to_the_weights(tmp_path: Path) -> None:
    from tenfold.nn import safetensors

    file = tmp_path / "a.safetensors"
    safetensors.write(file, {"x": np.ones((24 * 1024, 2048), np.float32)})
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)], env=os.environ, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    used, weights = map(int, run.stdout.split())
    assert weights == 192 * 2**20
    assert used < weights + 160 * 2**20  # compiling takes some 100 MiB; the file or a second copy would be 192 more
