"""Fingerprints of arrays: what changes them, and what does not; and where checkpoints are. More in `test_trainer`."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from tenfold.base.errors import CheckpointError, ConfigError
from tenfold.parallel.sharding import make_mesh
from tenfold.train.checkpoints import CheckpointConfig, Checkpoints, fingerprints, gather
from tenfold.train.state import TrainState
from tests.base.servers import S3Handler, Server, serving

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


class Writable(S3Handler):
    """S3 that takes and forgets objects, too."""

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server_state.files[unquote(urlsplit(self.path).path)] = body
        self.answer(200, headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def do_POST(self) -> None:
        """DeleteObjects."""
        url = urlsplit(self.path)
        assert url.query == "delete"
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        keys = re.findall("<Key>(.*?)</Key>", body)
        for key in keys:
            self.server_state.files.pop(f"/{url.path.strip('/')}/{key}", None)
        deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
        self.answer(200, f"<DeleteResult>{deleted}</DeleteResult>".encode())


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(Writable) as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in {"ENDPOINT": server.url, "ALLOW_HTTP": "true", "REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield server


def test_an_object_store_has_what_is_kept_and_a_new_machine_goes_on_from_it(s3: Server) -> None:
    def open_checkpoints() -> Checkpoints:
        return Checkpoints("s3://bucket/run", CheckpointConfig(save_total_limit=2))

    checkpoints = open_checkpoints()
    for step in (1, 2, 3):
        checkpoints.save(state(step), {"drawn": step})
    checkpoints.wait()
    assert {path.split("/")[3] for path in s3.files} == {"2", "3"}
    checkpoints.close()
    assert not Path(checkpoints.directory).exists()
    again = open_checkpoints()
    found = again.restore(abstract(state(0)))
    assert found is not None and (found.step, found.host) == (3, {"drawn": 3})
    np.testing.assert_array_equal(found.state.trainable["w"], state(3).trainable["w"])
    again.close()
    del s3.files["/bucket/run/3/COPIED"]  # as a machine leaves it that was lost while it copied
    earlier = open_checkpoints()
    found = earlier.restore(abstract(state(0)))
    assert found is not None and found.step == 2
    earlier.save(state(3), {"drawn": 4})
    earlier.wait()
    earlier.close()
    assert "/bucket/run/3/COPIED" in s3.files


def test_a_place_that_cannot_be_written_to_is_named(s3: Server) -> None:
    with pytest.raises(ConfigError, match="ftp://host/run: .* name a directory or file://, gs://, s3://, az://"):
        Checkpoints("ftp://host/run", CheckpointConfig())
    s3.status = (403, {})
    with pytest.raises(CheckpointError, match="s3://bucket/run cannot be used; check the URI and the credentials"):
        Checkpoints("s3://bucket/run", CheckpointConfig())


def test_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        CheckpointConfig(save_steps=0)
