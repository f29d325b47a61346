"""The short causal convolution in front of a recurrence: every channel by itself, over the last few tokens.

Dims: T packed tokens, C channels, W width (tokens that one output sees), P pages, R rows, L tokens of a row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tenfold.base.reach import RECURRENT, Reach
from tenfold.kernels.paged_attention import RaggedBatch
from tenfold.kernels.passed_blocks import passed_blocks, states_before


@dataclass(frozen=True)
class ConvolutionSpec:
    """A short convolution; static."""

    @property
    def reach(self) -> Reach:
        return RECURRENT


class Convolution(NamedTuple):
    """What a layer gives a convolution.

    Attributes:
        x: the inputs.
        weight: of each channel, for the oldest token first.
        bias: of each channel, or None.
    """

    x: Float[Array, "T C"]
    weight: Float[Array, "C W"]
    bias: Float[Array, " C"] | None


InputsCache = Float[Array, "P before C"]  # in page p of a sequence: the last inputs of the block, the oldest first


def reference(inputs: Convolution, segments: Int[Array, "R L"]) -> Float[Array, "T C"]:
    """The definition, within each segment of each row (T = R · L): what training uses."""
    R, L = segments.shape
    x = inputs.x.reshape(R, L, -1)

    def before(tokens: int) -> jax.Array:
        """The inputs so many tokens earlier; zero where that is another segment."""
        shifted = jnp.pad(x, ((0, 0), (tokens, 0), (0, 0)))[:, :L]
        same = jnp.pad(segments, ((0, 0), (tokens, 0)), constant_values=-1)[:, :L] == segments
        return jnp.where(same[..., None], shifted, 0).reshape(R * L, -1)

    return _combine(inputs, [before(tokens) for tokens in range(inputs.weight.shape[1])])


def short_convolution(
    inputs: Convolution, cache: InputsCache, batch: RaggedBatch, block_size: int, *, decode_only: bool = False
) -> tuple[Float[Array, "T C"], InputsCache]:
    """The convolution of each row's tokens, its last ones, with the inputs before them read from its pages.

    Leaves the last inputs of every block that has a page in it, in place when the cache is donated.
    """
    T, W = inputs.x.shape[0], inputs.weight.shape[1]
    S = batch.kv_lens.shape[0]
    blocks = passed_blocks(batch, block_size, T, decode_only=decode_only)
    # The inputs before a row are those before the first block that it passes.
    first_blocks = jnp.searchsorted(blocks.row, jnp.arange(S))
    before = states_before(cache, blocks.source[jnp.minimum(first_blocks, blocks.source.shape[0] - 1)])
    known = jnp.concatenate([before.reshape(S * (W - 1), -1).astype(inputs.x.dtype), inputs.x])

    def at(row: jax.Array, token: jax.Array) -> jax.Array:
        """The input at a packed index of a row, or so many before its first."""
        back = batch.query_starts[row] - token  # positive before the row
        return known[jnp.where(back > 0, (row + 1) * (W - 1) - jnp.minimum(back, W - 1), S * (W - 1) + token)]

    tokens = jnp.arange(T)
    row = jnp.clip(jnp.searchsorted(batch.query_starts, tokens, side="right") - 1, 0, S - 1)
    y = _combine(inputs, [at(row, tokens - ago) for ago in range(W)])
    ends = (blocks.first + blocks.length)[:, None] - jnp.arange(W - 1, 0, -1)[None]
    cache = cache.at[blocks.page].set(at(blocks.row[:, None], ends).astype(cache.dtype), mode="promise_in_bounds")
    return y, cache


def _combine(inputs: Convolution, shifted: list[jax.Array]) -> Float[Array, "T C"]:
    """The weighted sum, in float32, of the inputs 0, 1, … tokens ago."""
    weight = inputs.weight.astype(jnp.float32)
    y = sum(x.astype(jnp.float32) * weight[None, :, -1 - ago] for ago, x in enumerate(shifted))
    if inputs.bias is not None:
        y += inputs.bias.astype(jnp.float32)[None]
    return jnp.asarray(y).astype(inputs.x.dtype)
