"""Fingerprints of arrays: what changes them, and what does not; and where checkpoints are. More in `test_trainer`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from tenfold.base.errors import CheckpointError, ConfigError
from tenfold.parallel.hosts import gather
from tenfold.parallel.sharding import make_mesh
from tenfold.train.checkpoints import CheckpointConfig, Checkpoints, fingerprints
from tenfold.train.state import TrainState
from tests.base.servers import Server, writable_s3

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


def state(step: int) -> TrainState:
    return TrainState(jnp.asarray(step), {"w": jnp.arange(4.0) + step}, ())


def abstract(state: TrainState) -> TrainState:
    here = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)


def test_a_file_uri_is_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "a b"
    checkpoints = Checkpoints(directory.as_uri(), CheckpointConfig())
    checkpoints.save(state(3), {"drawn": 7})
    checkpoints.wait()
    checkpoints.close()
    again = Checkpoints(str(directory), CheckpointConfig())
    found = again.restore(abstract(state(0)))
    again.close()
    assert found is not None and (found.step, found.host) == (3, {"drawn": 7})
    np.testing.assert_array_equal(found.state.trainable["w"], state(3).trainable["w"])


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with writable_s3(monkeypatch) as server:
        yield server


def open_checkpoints(**config: Any) -> Checkpoints:
    return Checkpoints("s3://bucket/run", CheckpointConfig(**config))


def copied(s3: Server) -> set[str]:
    """The steps of which there are copies."""
    return {path.split("/")[3] for path in s3.files}


def object_of(s3: Server, step: int, name: str) -> str:
    (path,) = (path for path in s3.files if path.startswith(f"/bucket/run/{step}/") and path.endswith(f"/{name}"))
    return path


def test_an_object_store_has_what_is_kept_and_a_new_machine_goes_on_from_it(s3: Server) -> None:
    checkpoints = open_checkpoints(save_total_limit=2)
    for step in (1, 2, 3):
        checkpoints.save(state(step), {"drawn": step})
    checkpoints.wait()
    assert copied(s3) == {"2", "3"}
    assert not list(Path(checkpoints.directory).glob("*/state/*/[0-9]*"))  # parts of arrays, which the store has
    checkpoints.close()
    assert not Path(checkpoints.directory).exists()
    s3.requests.clear()
    again = open_checkpoints(save_total_limit=2)
    assert not [path for path in s3.downloads() if path.endswith("/0")]
    found = again.restore(abstract(state(0)))
    assert found is not None and (found.step, found.host) == (3, {"drawn": 3})
    np.testing.assert_array_equal(found.state.trainable["w"], state(3).trainable["w"])
    again.close()
    del s3.files[object_of(s3, 3, "COPIED-0")]  # as a machine leaves it that was lost while it copied
    earlier = open_checkpoints(save_total_limit=2)
    found = earlier.restore(abstract(state(0)))
    assert found is not None and found.step == 2
    earlier.save(state(3), {"drawn": 4})
    earlier.wait()
    earlier.close()
    assert object_of(s3, 3, "COPIED-0")  # and nothing of the one that was not whole
    assert copied(s3) == {"2", "3"}


@pytest.mark.parametrize("name", ["state/trainable.w/0", "host/metadata", "COPIED-0"])
@pytest.mark.parametrize("damage", ["flipped", "gone", "short"])
def test_a_damaged_copy_is_passed_over(name: str, damage: str, s3: Server) -> None:
    checkpoints = open_checkpoints()
    for step in (1, 2):
        checkpoints.save(state(step), {"drawn": step})
    checkpoints.wait()
    checkpoints.close()
    path = object_of(s3, 2, name)
    content = s3.files.pop(path)
    if damage != "gone":
        s3.files[path] = content[:-1] if damage == "short" else content[:-1] + bytes([content[-1] ^ 1])
    again = open_checkpoints()
    found = again.restore(abstract(state(0)))
    assert found is not None and (found.step, found.host) == (1, {"drawn": 1})
    again.save(state(2), {"drawn": 5})
    again.wait()
    again.close()
    last = open_checkpoints()
    found = last.restore(abstract(state(0)))
    last.close()
    assert found is not None and (found.step, found.host) == (2, {"drawn": 5})
    assert object_of(s3, 2, name)  # once: the damaged one is gone


def test_if_no_copy_can_be_read_the_run_does_not_start_anew(s3: Server) -> None:
    checkpoints = open_checkpoints()
    checkpoints.save(state(1), {})
    checkpoints.wait()
    checkpoints.close()
    s3.files[object_of(s3, 1, "host/metadata")] = b"{}"
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints in s3://bucket/run can be read"):
        open_checkpoints()


def test_the_best_copy_is_kept_besides_across_machines(s3: Server) -> None:
    config: dict[str, Any] = {"save_total_limit": 1, "metric_for_best_model": "eval_loss"}
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5)):
        checkpoints = open_checkpoints(**config)
        found = checkpoints.restore(abstract(state(0)))
        assert (found.step if found else 0) == step - 1
        checkpoints.save(state(step), {}, {"eval_loss": loss})
        checkpoints.wait()
        checkpoints.close()
    assert copied(s3) == {"2", "4"}
    checkpoints = open_checkpoints(**config)
    assert checkpoints.best_step() == 2
    checkpoints.close()


def test_a_copy_is_tried_again_with_the_next_one(s3: Server, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = open_checkpoints()
    s3.denied = True
    checkpoints.save(state(1), {})
    with pytest.raises(CheckpointError, match="s3://bucket/run cannot be used"):
        checkpoints.wait()
    s3.denied = False
    checkpoints.save(state(2), {})
    checkpoints.wait()
    checkpoints.close()
    assert copied(s3) == {"1", "2"}
    assert "is tried again with the next one" in caplog.text


def test_a_place_that_cannot_be_written_to_is_named(s3: Server) -> None:
    with pytest.raises(ConfigError, match="ftp://host/run: .* name a directory or file://, gs://, s3://, az://"):
        Checkpoints("ftp://host/run", CheckpointConfig())
    s3.status = (403, {})
    with pytest.raises(CheckpointError, match="s3://bucket/run cannot be used; check the URI and the credentials"):
        Checkpoints("s3://bucket/run", CheckpointConfig())


def test_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        CheckpointConfig(save_steps=0)
