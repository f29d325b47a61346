"""Caches are as large as the memory estimate takes them to be, in every type and layout."""

import jax
import pytest

from tenfold.engine.config import KV_CACHE_DTYPES, EngineConfig
from tenfold.engine.memory import cache_dtype
from tenfold.kernels.paged_attention import NativeCache
from tenfold.nn.cache import KeyValueSpec


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kept", list(KV_CACHE_DTYPES))
def test_a_cache_takes_the_bytes_that_were_planned(kept: str, dtype: str, native: bool) -> None:
    spec, held = KeyValueSpec(num_kv_heads=3, head_dim=20), cache_dtype(EngineConfig(kv_cache_dtype=kept), dtype)
    cache = spec.make(7, 16, dtype, native=native, held=held)
    assert isinstance(cache, NativeCache) == native
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == 7 * spec.page_bytes(16, held)
    assert {x.dtype.name for x in (cache.k, cache.v)} == {held.name}
    assert (cache.k_scales is not None) == (held.itemsize == 1)


@pytest.mark.parametrize(("page", "head_dim"), [(4, 16), (16, 6)])
def test_pages_that_no_native_operation_takes_are_plain(page: int, head_dim: int) -> None:
    spec = KeyValueSpec(num_kv_heads=2, head_dim=head_dim)
    assert not isinstance(spec.make(3, page, "float32", native=True, held="int8"), NativeCache)
