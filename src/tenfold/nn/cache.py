"""What a model tells the engine about the cache that its layers need."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheSpec:
    """The key-value cache of one layer.

    Attributes:
        num_kv_heads, head_dim: values per token are 2 · num_kv_heads · head_dim.
        window: the layer sees this many last tokens, itself included; None sees all. Layers with equal windows share
            one block table.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
