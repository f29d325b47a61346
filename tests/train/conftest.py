"""What tests of training share."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def mixed_dtypes() -> Iterator[None]:
    """optax multiplies floats with integer step counts, which the suite's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield
