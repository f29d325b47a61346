"""What tests of the native kernels share."""

from collections.abc import Iterator

import jax
import pytest

from tenfold.kernels import native


@pytest.fixture(params=native.INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    widest = native.instruction_set()
    if not native.use(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    assert widest is not None and native.use(widest)


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """As where there is only one: several leave differentiated products and attention to XLA."""
    with jax.default_device(jax.devices()[0]):
        yield
