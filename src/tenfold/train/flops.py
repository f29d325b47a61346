"""Model FLOPs, and what devices can do at most: their quotient is utilisation (Chowdhery et al., 2022, appendix B)."""

import math
import time

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tenfold.kernels.attention import AttentionSpec
from tenfold.models.family import Model
from tenfold.nn.cache import KeyValueSpec
from tenfold.nn.param import leaves

PEAK_BF16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense products in bfloat16 per second, as the vendors state them, by the beginning of a device's name."""


def flops_per_token(model: Model, length: int) -> float:
    """Floating-point operations of a training step for each token: forward, and backward, which is twice that.

    Six for each weight of a product, of experts those that a token reaches; and of attention, which is causal, half
    the scores of a row, or those within its window. Recomputation does not count.

    Args:
        model: the architecture.
        length: tokens of a row.
    """
    products = 0.0
    for _, p in leaves(model.params()):
        size = math.prod(p.shape)
        if p.experts is not None:
            size *= model.config.router.top_k / p.experts  # pyright: ignore[reportAttributeAccessIssue]
        if p.inputs:
            products += size
    attention = 0.0
    for kind, cache in zip(model.kinds(), model.cache_specs(), strict=False):
        if isinstance(kind, AttentionSpec) and isinstance(cache, KeyValueSpec):
            heads = getattr(model.config, "H", cache.num_kv_heads)
            seen = min(length / 2, kind.window or length)
            attention += 2 * 2 * heads * cache.head_dim * seen  # scores, and the mean of the values
    return 6 * products + 3 * attention


def peak_flops(dtype: DTypeLike) -> float:
    """Operations per second that all devices of the run do at most: as stated by the vendor, or else measured."""
    device = jax.devices()[0]
    stated = [peak for name, peak in PEAK_BF16.items() if device.device_kind.startswith(name)]
    if stated and jnp.dtype(dtype).itemsize == 2:
        return stated[0] * jax.device_count()
    return _measured(jnp.dtype(dtype).name) * (jax.process_count() if device.platform == "cpu" else jax.device_count())


def _measured(dtype: str, size: int = 1024) -> float:
    """The best of some square products here. Devices of a CPU share it, so that this is of all of them."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
