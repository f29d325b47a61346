"""What a model tells the engine about the caches of its layers, and the caches themselves."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tenfold.base.errors import ConfigError
from tenfold.base.reach import FULL, RECURRENT, Reach
from tenfold.kernels.paged_attention import Cache, has_native_cache, make_cache, make_native_cache, page_bytes


@runtime_checkable
class CacheSpec(Protocol):
    """A paged cache of one layer, which may have several. Those with equal reaches share one block table."""

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


@dataclass(frozen=True)
class LatentCacheSpec:
    """A latent of every token, from which all heads make their keys and values, and a rotated key that they share.

    Attributes:
        latent_dim, rotated_dim: values per token are their sum.
    """

    latent_dim: int
    rotated_dim: int

    @property
    def reach(self) -> Reach:
        return FULL

    def page_bytes(self, page_size: int, dtype: DTypeLike) -> int:
        return page_size * (self.latent_dim + self.rotated_dim) * jnp.dtype(dtype).itemsize

    def make(self, num_pages: int, page_size: int, dtype: DTypeLike, *, native: bool, held: DTypeLike) -> jax.Array:
        if jnp.dtype(held) != jnp.dtype(dtype):
            raise ConfigError(
                f"a cache of latents cannot be held in {jnp.dtype(held).name}. Use --kv-cache-dtype auto."
            )
        return jnp.zeros((num_pages, page_size, self.latent_dim + self.rotated_dim), dtype)


@dataclass(frozen=True)
class InputsSpec:
    """The last inputs of a short convolution, as they are after the last token of a page. In float32: there are few.

    Attributes:
        channels: of the convolution.
        width: tokens that one output sees, itself included.
    """

    channels: int
    width: int

    @property
    def reach(self) -> Reach:
        return RECURRENT

    def page_bytes(self, page_size: int, dtype: DTypeLike) -> int:
        return 4 * (self.width - 1) * self.channels

    def make(self, num_pages: int, page_size: int, dtype: DTypeLike, *, native: bool, held: DTypeLike) -> jax.Array:
        return jnp.zeros((num_pages, self.width - 1, self.channels), jnp.float32)


@dataclass(frozen=True)
class StateSpec:
    """The state of a linear recurrence, as it is after the last token of a page. In float32: errors would add up.

    Attributes:
        num_heads, key_dim, value_dim: a state is a matrix of key_dim x value_dim for each head.
    """

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def reach(self) -> Reach:
        return RECURRENT

    def page_bytes(self, page_size: int, dtype: DTypeLike) -> int:
        return 4 * self.num_heads * self.key_dim * self.value_dim

    def make(self, num_pages: int, page_size: int, dtype: DTypeLike, *, native: bool, held: DTypeLike) -> jax.Array:
        return jnp.zeros((num_pages, self.num_heads, self.key_dim, self.value_dim), jnp.float32)
