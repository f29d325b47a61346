"""The array annotations are checked while tests run."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from tenfold.kernels.sampling import logprobs


def test_a_wrong_shape_is_refused() -> None:
    logprobs(jnp.zeros((2, 8)), jnp.zeros(2, jnp.int32), k=1)
    with pytest.raises(TypeCheckError):
        logprobs(jnp.zeros((2, 8)), jnp.zeros(3, jnp.int32), k=1)
