"""How the device's memory is shared between weights and cache, decided before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jax.typing import DTypeLike

from tenfold.base.errors import ConfigError, MemoryBudgetError
from tenfold.base.reach import Reach
from tenfold.engine.config import KV_CACHE_DTYPES, EngineConfig
from tenfold.engine.pages import Group
from tenfold.models.family import Model
from tenfold.nn.cache import CacheSpec
from tenfold.nn.quantization import Quantization, nbytes

GIB = 2**30
CPU_CACHE_BYTES = 4 * GIB  # a CPU's memory belongs to others too: take no more than this unless told to


@dataclass(frozen=True)
class CachePlan:
    """The sizes that an engine runs with.

    Attributes:
        groups: pools of pages, one per distinct reach.
        max_model_len: longest sequence.
        num_bytes: of all pools.
    """

    groups: tuple[Group, ...]
    max_model_len: int
    num_bytes: int


def free_memory(device: Any) -> int:
    """Bytes that the device can still give; for a CPU, what the operating system calls available."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return psutil.virtual_memory().available


def cache_dtype(config: EngineConfig, dtype: DTypeLike) -> jnp.dtype:
    """What keys and values are held in, where `dtype` is computed in."""
    return jnp.dtype(KV_CACHE_DTYPES[config.kv_cache_dtype] or dtype)


def plan_cache(
    model: Model, config: EngineConfig, dtype: DTypeLike, free: int, platform: str, *quantizations: Quantization | None
) -> CachePlan:
    """Sizes the cache for a model about to be loaded into `free` bytes, its weights as `quantizations` hold them.

    Raises:
        ConfigError: if max_model_len is more than the model's own.
        MemoryBudgetError: if the weights, or the cache of one sequence, will not fit; says what to change.
    """
    weights = nbytes(model.params(), dtype, *quantizations)
    budget = config.cache_memory
    if budget is None:
        budget = int(free * config.memory_utilization) - weights
        budget = min(budget, CPU_CACHE_BYTES) if platform == "cpu" else budget
    if weights + max(budget, 0) > free or budget <= 0:
        raise MemoryBudgetError(
            f"{model.architecture} needs {weights / GIB:.2f} GiB for its weights in {jnp.dtype(dtype).name} and "
            f"{max(budget, 0) / GIB:.2f} GiB for its cache; {free / GIB:.2f} GiB are free. Use a smaller model or dtype"
            + (", or a smaller cache memory." if config.cache_memory else ".")
        )
    longest = config.max_model_len or model.config.max_len
    if longest > model.config.max_len:
        raise ConfigError(
            f"max_model_len={longest} is longer than the {model.config.max_len} positions that the model was made for."
        )
    while True:
        plan = _plan(jax.tree.leaves(model.cache_specs()), config, cache_dtype(config, dtype), longest, budget)
        if plan.num_bytes <= budget:
            return plan
        if config.max_model_len is not None or longest <= 64:
            raise MemoryBudgetError(
                f"one sequence of {longest} tokens needs {plan.num_bytes / GIB:.3f} GiB of cache; the cache has "
                f"{budget / GIB:.3f} GiB. Lower max_model_len or give the cache more memory."
            )
        longest = max(64, longest * 7 // 8)


def _plan(specs: Sequence[CacheSpec], config: EngineConfig, dtype: DTypeLike, longest: int, budget: int) -> CachePlan:
    """Every group gets pages for the same number of longest sequences: as many as fit, at least one, and no more than
    can run at once."""
    B = config.block_size
    reaches = list(dict.fromkeys(spec.reach for spec in specs))
    bytes_of = dict.fromkeys(reaches, 0)
    for spec in specs:
        bytes_of[spec.reach] += spec.page_bytes(B, dtype)
    wanted = {reach: blocks_of(reach, longest, config) for reach in reaches}
    null_pages = sum(bytes_of.values())
    each = sum(wanted[reach] * bytes_of[reach] for reach in reaches)
    sequences = min(max(1.0, (budget - null_pages) / each), float(config.max_num_seqs))
    groups = tuple(Group(reach, 1 + int(wanted[reach] * sequences), _every(reach, config)) for reach in reaches)
    return CachePlan(groups, longest, sum(group.num_pages * bytes_of[group.reach] for group in groups))


def _every(reach: Reach, config: EngineConfig) -> int:
    """Of how many blocks one keeps its page: `Group.every`."""
    return -(-config.state_interval // config.block_size) if reach.recurrent else 1


def blocks_of(reach: Reach, length: int, config: EngineConfig) -> int:
    """The most pages that a sequence of `length` tokens owns at once: what is in reach, and a chunk being computed.

    Of recurrent layers these are the state that the chunk starts from, those that it keeps on its way, and its last.
    """
    B, chunk = config.block_size, config.max_num_batched_tokens
    if reach.recurrent:
        return min(-(-length // B), 2 + -(-chunk // (_every(reach, config) * B)))
    seen = length if reach.most is None else min(length, reach.most + chunk + B)
    return -(-seen // B)
