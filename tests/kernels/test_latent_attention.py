"""Latent attention over pages against the formula, and the definition against it too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.kernels import latent_attention as op
from tenfold.kernels.latent_attention import Latents, LatentSpec
from tenfold.kernels.paged_attention import RaggedBatch
from tenfold.nn.cache import LatentCacheSpec

H, R, K, KR, V = 3, 10, 6, 4, 7
T, S, N, B = 100, 5, 150, 4
SPEC = LatentSpec(0.3)

paged = jax.jit(op.paged_latent_attention, static_argnames=("spec", "decode_only"))


def random_latents(*lengths: int) -> list[Latents]:
    """The inputs of all tokens of some sequences."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    maps = draw(H, K, R) / 2, draw(H, V, R)
    return [Latents(draw(n, H, K), draw(n, H, KR), draw(n, R), draw(n, KR), *maps) for n in lengths]


def naive(x: Latents) -> np.ndarray:
    """What each token of one sequence reads, in float64 from the formula."""
    q, q_rotated, latent, k_rotated, to_keys, to_values = (part.astype(np.float64) for part in x)
    k, v = np.einsum("sr,hkr->shk", latent, to_keys), np.einsum("sr,hvr->shv", latent, to_values)
    scores = np.einsum("thk,shk->hts", q, k) + np.einsum("thk,sk->hts", q_rotated, k_rotated)
    scores = np.where(np.tri(len(q), dtype=bool), scores * SPEC.scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shv->thv", weights / weights.sum(-1, keepdims=True), v)


def step(sequences: list[tuple[Latents, int]], tokens: int = T) -> tuple[Latents, jax.Array, RaggedBatch, np.ndarray]:
    """The packed new tokens of sequences, the last so many of each, with a cache that holds all tokens."""
    tables, lens, starts = np.zeros((S, N), np.int32), np.zeros(S, np.int32), np.zeros(S + 1, np.int32)
    cache = jnp.full((1 + S * N, B, R + KR), 3e38)  # which must not be seen
    pages = np.random.default_rng(1).permutation(S * N).astype(np.int32) + 1
    parts, expected = [], []
    for row, (x, new) in enumerate(sequences):
        total = len(x.q)
        tables[row, : -(-total // B)] = pages[row * N : row * N - (-total // B)]
        positions = np.arange(total, dtype=np.int32)
        cache = op.write(cache, *jax.device_put((x, tables[row, positions // B], positions % B)))
        lens[row], starts[row + 1 :] = total, starts[row] + new
        parts.append([part[total - new :] for part in x[:4]])
        expected.append(naive(x)[total - new :])
    packed = [np.concatenate(part) for part in zip(*parts, strict=True)]
    rest = tokens - len(packed[0])
    padded = [np.pad(part, ((0, rest), *((0, 0),) * (part.ndim - 1))) for part in packed]
    decodes = sum(new == 1 for _, new in sequences)
    batch = RaggedBatch(tables, lens, starts, np.int32(decodes), np.int32(len(sequences)))
    return Latents(*padded, *sequences[0][0][4:]), cache, batch, np.concatenate(expected)


def test_ragged_rows_over_pages_read_what_the_formula_says() -> None:
    long, short, whole, chunk = random_latents(300, 5, 70, 290)
    inputs, cache, batch, expected = step([(long, 1), (short, 1), (whole, 70), (chunk, 9)])
    out = np.asarray(paged(inputs, cache, batch, spec=SPEC))
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=2e-5, atol=2e-5)
    assert np.isfinite(out).all()  # padding goes through the layers that follow


def test_long_prompts_and_short_chunks_share_a_step() -> None:
    """More queries than share what latents expand to; few after many keys, which are absorbed; and in one block of
    rows a whole prompt, which is not."""
    decode, long, chunk, whole, late = random_latents(40, 560, 290, 30, 310)
    inputs, cache, batch, expected = step([(decode, 1), (long, 550), (chunk, 9), (whole, 30), (late, 100)], 700)
    out = np.asarray(paged(inputs, cache, batch, spec=SPEC))
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("queries", [2, 64, 170, 171, 512])
@pytest.mark.parametrize("before", [0, 64, 600, 100_000])
def test_the_way_with_fewer_multiplications_is_taken(queries: int, before: int) -> None:
    """For a head of DeepSeek's sizes, mapping to latents and back against making keys and values of them."""
    keys, R, K, KR, V = before + queries, 512, 128, 64, 128
    absorbed = queries * (R * K + R * V) + queries * keys * (R + KR + R)
    expanded = keys * (R * K + R * V) + queries * keys * (K + KR + V)
    assert bool(op.expands(jnp.int32(queries), jnp.int32(keys), K, R, V)) == (expanded < absorbed)


def test_a_step_of_decodes_reads_what_the_formula_says() -> None:
    inputs, cache, batch, expected = step([(x, 1) for x in random_latents(300, 5, 1, 257)])
    out = np.asarray(paged(inputs, cache, batch, spec=SPEC, decode_only=True))
    np.testing.assert_allclose(out[:4], expected, rtol=2e-5, atol=2e-5)


def test_the_definition_is_the_formula() -> None:
    first, second = random_latents(9, 6)
    packed = Latents(*(jnp.concatenate(parts) for parts in zip(first[:4], second[:4], strict=True)), *first[4:])
    segments = jnp.asarray([[1] * 9 + [2] * 6])
    out = jax.jit(partial(op.reference, spec=SPEC))(packed, segments)
    np.testing.assert_allclose(out, np.concatenate([naive(first), naive(second)]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_token_takes_its_latent_and_its_rotated_key_and_nothing_else(dtype: jnp.dtype) -> None:
    """576 values for a token and layer of DeepSeek V3."""
    spec = LatentCacheSpec(512, 64)
    cache = spec.make(3, 32, dtype, native=False, held=dtype)
    assert cache.nbytes == 3 * spec.page_bytes(32, dtype) == 3 * 32 * 576 * jnp.dtype(dtype).itemsize
