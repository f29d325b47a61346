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

H, R, K = 3, 10, 4
T, S, N, B = 100, 5, 80, 4
SPEC = LatentSpec(0.3)

paged = jax.jit(op.paged_latent_attention, static_argnames=("spec", "decode_only"))


def random_latents(*lengths: int) -> list[Latents]:
    """The inputs of all tokens of some sequences."""
    rng = np.random.default_rng(0)
    shapes = ((H, R), (H, K), (R,), (K,))
    return [Latents(*(rng.standard_normal((n, *dims)).astype(np.float32) for dims in shapes)) for n in lengths]


def naive(x: Latents) -> np.ndarray:
    """What each token of one sequence reads, in float64 from the formula."""
    q, q_rotated, latent, k_rotated = (part.astype(np.float64) for part in x)
    scores = np.einsum("thr,sr->hts", q, latent) + np.einsum("thk,sk->hts", q_rotated, k_rotated)
    weights = np.exp(scores * SPEC.scale) * np.tri(len(q))
    return np.einsum("hts,sr->thr", weights / weights.sum(-1, keepdims=True), latent)


def step(sequences: list[tuple[Latents, int]]) -> tuple[Latents, jax.Array, RaggedBatch, np.ndarray]:
    """The packed new tokens of sequences, the last so many of each, with a cache that holds all tokens."""
    tables, lens, starts = np.zeros((S, N), np.int32), np.zeros(S, np.int32), np.zeros(S + 1, np.int32)
    cache = jnp.full((1 + S * N, B, R + K), 1e4)  # which must not be seen
    pages = np.random.default_rng(1).permutation(S * N).astype(np.int32) + 1
    parts, expected = [], []
    for row, (x, new) in enumerate(sequences):
        total = len(x.q)
        tables[row, : -(-total // B)] = pages[row * N : row * N - (-total // B)]
        positions = np.arange(total, dtype=np.int32)
        cache = op.write(cache, *jax.device_put((x, tables[row, positions // B], positions % B)))
        lens[row], starts[row + 1 :] = total, starts[row] + new
        parts.append(Latents(*(part[total - new :] for part in x)))
        expected.append(naive(x)[total - new :])
    packed = Latents(*(np.concatenate(part) for part in zip(*parts, strict=True)))
    rest = T - len(packed.q)
    padded = Latents(*(np.pad(part, ((0, rest), *((0, 0),) * (part.ndim - 1))) for part in packed))
    decodes = sum(new == 1 for _, new in sequences)
    batch = RaggedBatch(tables, lens, starts, np.int32(decodes), np.int32(len(sequences)))
    return padded, cache, batch, np.concatenate(expected)


def test_ragged_rows_over_pages_read_what_the_formula_says() -> None:
    long, short, whole, chunk = random_latents(300, 5, 70, 290)
    inputs, cache, batch, expected = step([(long, 1), (short, 1), (whole, 70), (chunk, 9)])
    out = np.asarray(paged(inputs, cache, batch, spec=SPEC))
    np.testing.assert_allclose(out[: len(expected)], expected, rtol=2e-5, atol=2e-5)
    assert np.isfinite(out).all()  # padding goes through the layers that follow


def test_a_step_of_decodes_reads_what_the_formula_says() -> None:
    inputs, cache, batch, expected = step([(x, 1) for x in random_latents(300, 5, 1, 257)])
    out = np.asarray(paged(inputs, cache, batch, spec=SPEC, decode_only=True))
    np.testing.assert_allclose(out[:4], expected, rtol=2e-5, atol=2e-5)


def test_the_definition_is_the_formula() -> None:
    first, second = random_latents(9, 6)
    packed = Latents(*(jnp.concatenate(parts) for parts in zip(first, second, strict=True)))
    segments = jnp.asarray([[1] * 9 + [2] * 6])
    out = jax.jit(partial(op.reference, spec=SPEC))(packed, segments)
    np.testing.assert_allclose(out, np.concatenate([naive(first), naive(second)]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_token_takes_its_latent_and_its_rotated_key_and_nothing_else(dtype: jnp.dtype) -> None:
    """576 values for a token and layer of DeepSeek V3."""
    spec = LatentCacheSpec(512, 64)
    cache = spec.make(3, 32, dtype, native=False, held=dtype)
    assert cache.nbytes == 3 * spec.page_bytes(32, dtype) == 3 * 32 * 576 * jnp.dtype(dtype).itemsize
