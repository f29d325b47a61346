"""Linear attention with a decaying state: Gated DeltaNet (Yang et al., 2024) and Mamba 2 (Dao and Gu, 2024).

A head's state S is a matrix that a token first decays, then writes to, then reads:

    S ← exp(decay) · S        u = v, or by the delta rule  u = beta · (v − k · S)
    S ← S + k ⊗ u             o = q · S

Mamba 2 is this with C, B and Δ · x as q, k and v, and Δ · A as decay.

Dims: T packed tokens, J key heads, H heads (a multiple of J), K key dim, V value dim, P pages, R rows, L tokens of a
row or block.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from tenfold.base.reach import RECURRENT, Reach
from tenfold.kernels.paged_attention import RaggedBatch
from tenfold.kernels.passed_blocks import PassedBlocks, passed_blocks, states_before

DECODE_ROWS = 8  # decoding sequences whose states are read and written together


@dataclass(frozen=True)
class RecurrenceSpec:
    """A linear recurrence; static."""

    @property
    def reach(self) -> Reach:
        return RECURRENT


class Recurrence(NamedTuple):
    """What a layer gives a recurrence.

    Attributes:
        q, k: what tokens read and write with; each key head serves H / J neighbouring heads.
        v: what they write.
        decay: logarithm of what the state is multiplied by; not above 0.
        beta: how far the delta rule replaces what the state answers to k; None adds v to it.
    """

    q: Float[Array, "T J K"]
    k: Float[Array, "T J K"]
    v: Float[Array, "T H V"]
    decay: Float[Array, "T H"]
    beta: Float[Array, "T H"] | None


StateCache = Float[Array, "P H K V"]  # in page p of a sequence: the state after the last token of the block


def reference(inputs: Recurrence, fresh: Bool[Array, "R L"]) -> tuple[Float[Array, "T H V"], Float[Array, "R H K V"]]:
    """The definition, token by token, from a zero state at each `fresh` token (T = R · L): what training uses.

    Also returns the last states.
    """
    R, L = fresh.shape
    H, V = inputs.v.shape[1:]
    x = _in_float32(inputs)

    def token(state: jax.Array, at: tuple[Recurrence, jax.Array]) -> tuple[jax.Array, jax.Array]:
        now, starts = at
        return _step(jnp.where(starts[:, None, None, None], 0, state), now)

    over_tokens = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(R, L, *a.shape[1:]), 1, 0), x)
    state = jnp.zeros((R, H, x.k.shape[-1], V))
    state, o = jax.lax.scan(token, state, (over_tokens, fresh.T))
    return jnp.moveaxis(o, 0, 1).reshape(R * L, H, V).astype(inputs.v.dtype), state


def paged_recurrence(
    inputs: Recurrence, cache: StateCache, batch: RaggedBatch, block_size: int, *, decode_only: bool = False
) -> tuple[Float[Array, "T H V"], StateCache]:
    """The recurrence of each row's tokens, its last ones, from the states in its pages.

    Leaves the state after every block that has a page in it, in place when the cache is donated. Rows with one token
    take one step of the definition; the others go block by block in the chunked form of `_block`.
    """
    T = inputs.v.shape[0]
    blocks = passed_blocks(batch, block_size, T, decode_only=decode_only)
    rows = min(DECODE_ROWS, T)
    x = jax.tree.map(lambda a: jnp.pad(a, ((0, max(rows, block_size)), *((0, 0),) * (a.ndim - 1))), _in_float32(inputs))
    out = jnp.zeros(x.v.shape, jnp.float32)
    out, cache = _decode_rows(x, out, cache, blocks, batch.num_decodes, rows)
    if not decode_only:
        out, cache = _prefill_blocks(x, out, cache, blocks, batch.num_decodes, block_size)
    return out[:T].astype(inputs.v.dtype), cache


def _decode_rows(
    x: Recurrence, out: jax.Array, cache: StateCache, blocks: PassedBlocks, num_decodes: Int[Array, ""], rows: int
) -> tuple[jax.Array, StateCache]:
    """The rows with one token, `rows` at a time: token r is row r, and block r."""
    padded = [jnp.pad(pages, (0, rows)) for pages in (blocks.source, blocks.page)]

    def group(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, cache = carry
        used = i * rows + jnp.arange(rows) < num_decodes
        source, page = (jnp.where(used, jax.lax.dynamic_slice_in_dim(pages, i * rows, rows), 0) for pages in padded)
        now = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i * rows, rows), x)
        state, o = _step(states_before(cache, source), now)
        cache = cache.at[page].set(state, mode="promise_in_bounds")
        return jax.lax.dynamic_update_slice_in_dim(out, o, i * rows, 0), cache

    return jax.lax.fori_loop(0, (num_decodes + rows - 1) // rows, group, (out, cache))


def _prefill_blocks(
    x: Recurrence, out: jax.Array, cache: StateCache, blocks: PassedBlocks, num_decodes: Int[Array, ""], size: int
) -> tuple[jax.Array, StateCache]:
    """The other rows, block after block. What a block writes past its tokens, the next overwrites."""

    def block(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, cache = carry
        first, used = blocks.first[i], jnp.arange(size) < blocks.length[i]
        now = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, size), x)
        o, state = _block(now, states_before(cache, blocks.source[i][None])[0], used)
        cache = jax.lax.dynamic_update_index_in_dim(cache, state, blocks.target[i], 0)
        return jax.lax.dynamic_update_slice_in_dim(out, o, first, 0), cache

    return jax.lax.fori_loop(num_decodes, blocks.num, block, (out, cache))


def _step(state: Float[Array, "R H K V"], now: Recurrence) -> tuple[jax.Array, jax.Array]:
    """One token of each row: the definition. Returns the new states and what is read from them."""
    state = state * jnp.exp(now.decay)[:, :, None, None]
    u = now.v
    if now.beta is not None:
        u = now.beta[..., None] * (u - (state * now.k[..., None]).sum(2))
    state = state + now.k[..., None] * u[:, :, None, :]
    return state, (state * now.q[..., None]).sum(2)


def _block(
    now: Recurrence, state: Float[Array, "H K V"], used: Bool[Array, " L"]
) -> tuple[Float[Array, "L H V"], Float[Array, "H K V"]]:
    """L tokens of one row at once: products of matrices instead of L steps. Tokens that are not `used` change nothing.

    With γ the decays summed up to each token, what token i finds of token j is exp(γᵢ − γⱼ) of what j wrote. The delta
    rule's u are then the solution of a triangular system (Yang et al., 2024).
    """
    q, k, v = (jnp.moveaxis(a, 0, 1) for a in (now.q, jnp.where(used[:, None, None], now.k, 0), now.v))  # H L ·
    decayed = jnp.cumsum(jnp.where(used[:, None], now.decay, 0), axis=0).T
    since = jnp.exp(decayed)[..., None]  # of the state before the block, at each token
    L = used.shape[0]
    causal = jnp.tril(jnp.ones((1, L, L), bool))
    between = jnp.exp(jnp.where(causal, decayed[:, :, None] - decayed[:, None, :], -jnp.inf))

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, precision="highest")

    u = v
    if now.beta is not None:
        beta = now.beta.T[..., None]
        u = beta * (v - product(k * since, state))
        u = solve_triangular(beta * product(k, k.mT) * between, u, lower=True, unit_diagonal=True)
    o = product(q * since, state) + product(product(q, k.mT) * between, u)
    left = jnp.exp(decayed[:, -1:] - decayed)[..., None]  # of what each token wrote, at the end of the block
    state = state * since[:, -1:] + product((k * left).mT, u)
    return jnp.moveaxis(o, 0, 1), state


def _in_float32(inputs: Recurrence) -> Recurrence:
    """The inputs in float32, with a key head for each head."""
    shared = inputs.v.shape[1] // inputs.k.shape[1]
    x = jax.tree.map(lambda a: a.astype(jnp.float32), inputs)
    return x._replace(q=jnp.repeat(x.q, shared, axis=1), k=jnp.repeat(x.k, shared, axis=1))
