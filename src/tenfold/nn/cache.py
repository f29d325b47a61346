"""What a model tells the engine about the caches of its layers, and the caches themselves."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jax.typing import DTypeLike

from tenfold.base.reach import Reach
from tenfold.kernels.paged_attention import Cache, has_native_cache, make_cache, make_native_cache, page_bytes


@runtime_checkable
class CacheSpec(Protocol):
    """The paged cache of one layer. Layers with equal reaches share one block table."""

    @property
    def reach(self) -> Reach: ...

    def page_bytes(self, page_size: int, dtype: DTypeLike) -> int:
        """Bytes of a page of `page_size` tokens, where elements are held in `dtype`."""
        ...

    def make(self, num_pages: int, page_size: int, dtype: DTypeLike, *, native: bool, held: DTypeLike) -> Any:
        """An empty cache for a layer that computes in `dtype` and holds its elements in `held`.

        `native`: whether the native CPU operations serve it. Raises ConfigError if it cannot be held so.
        """
        ...


@dataclass(frozen=True)
class KeyValueSpec:
    """Keys and values of every token.

    Attributes:
        num_kv_heads, head_dim: values per token are 2 · num_kv_heads · head_dim.
        window, chunk: as in `Reach`.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    chunk: int | None = None

    @property
    def reach(self) -> Reach:
        return Reach(self.window, self.chunk)

    def page_bytes(self, page_size: int, dtype: DTypeLike) -> int:
        return page_bytes(page_size, self.num_kv_heads, self.head_dim, dtype)

    def make(self, num_pages: int, page_size: int, dtype: DTypeLike, *, native: bool, held: DTypeLike) -> Cache:
        make = make_native_cache if native and has_native_cache(page_size, self.head_dim, held) else make_cache
        return make(num_pages, page_size, self.num_kv_heads, self.head_dim, held)
