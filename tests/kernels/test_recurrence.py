"""Recurrent layers over pages against their definitions: however sequences are cut into steps and share them."""

from dataclasses import dataclass
from functools import partial
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.kernels import convolution, recurrence
from tenfold.kernels.convolution import Convolution, short_convolution
from tenfold.kernels.paged_attention import RaggedBatch
from tenfold.kernels.recurrence import Recurrence, paged_recurrence

LENGTHS = (1, 3, 4, 9, 23, 30)
BLOCK, EVERY = 4, 3  # tokens of a page; every so manieth block that a step passes keeps its state
T, S, N, PAGES = 24, 5, 9, 64
J, H, K, V = 2, 6, 5, 7
C, W = 11, 4


@dataclass
class Row:
    """A sequence on its way, with the page of each of its blocks."""

    index: int
    length: int
    table: list[int]
    computed: int = 0


def steps(seed: int) -> list[list[tuple[Row, int]]]:
    """Random steps until every sequence is computed: rows with how many tokens they compute, single ones first."""
    random, free = Random(seed), list(range(1, PAGES))
    waiting = [Row(i, length, []) for i, length in enumerate(LENGTHS)]
    planned: list[list[tuple[Row, int]]] = []
    done = {row.index: 0 for row in waiting}
    while any(done[row.index] < row.length for row in waiting):
        room, step = T, []
        for row in random.sample(waiting, len(waiting))[:S]:
            length = min(random.choice([1, 1, 2, 5, 13]), row.length - done[row.index], room)
            if length:
                room -= length
                done[row.index] += length
                step.append((row, length))
        if step:
            planned.append(sorted(step, key=lambda entry: entry[1] > 1))
        for row, _ in step:
            blocks = -(-done[row.index] // BLOCK)
            for block in range(len(row.table), blocks):
                row.table.append(free.pop() if (block + 1) % EVERY == 0 or block == blocks - 1 else 0)
    return planned


def ragged(step: list[tuple[Row, int]]) -> RaggedBatch:
    tables, lens, starts = np.zeros((S, N), np.int32), np.zeros(S, np.int32), np.zeros(S + 1, np.int32)
    for r, (row, length) in enumerate(step):
        blocks = -(-(row.computed + length) // BLOCK)
        tables[r, :blocks] = row.table[:blocks]
        lens[r] = row.computed + length
        starts[r + 1 :] = starts[r] + length
    decodes = sum(length == 1 for _, length in step)
    return RaggedBatch(tables, lens, starts, np.int32(decodes), np.int32(len(step)))


def random_inputs(*dims: int, seed: int = 0) -> np.ndarray:
    """Of all sequences, end to end."""
    return np.random.default_rng([seed, *dims]).standard_normal((sum(LENGTHS), *dims)).astype(np.float32)


OFFSETS = np.cumsum([0, *LENGTHS])
SEGMENTS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)[None]


def serve(op, inputs, cache, seed: int):
    """Runs all steps; returns the outputs of all sequences end to end, and the cache with the rows' tables."""
    out: np.ndarray | None = None
    rows: dict[int, Row] = {}
    for step in steps(seed):
        batch = ragged(step)
        chosen = np.concatenate([OFFSETS[row.index] + row.computed + np.arange(length) for row, length in step])
        padded = np.concatenate([chosen, np.zeros(T - len(chosen), int)])
        y, cache = op(jax.tree.map(lambda a: a[padded], inputs), cache, batch)  # noqa: B023
        out = np.zeros((sum(LENGTHS), *y.shape[1:]), np.float32) if out is None else out
        out[chosen] = np.asarray(y)[: len(chosen)]
        for row, length in step:
            row.computed += length
            rows[row.index] = row
    return out, np.asarray(cache), rows


def make_recurrence(delta: bool, shared: bool) -> Recurrence:
    heads = J if shared else H
    k = random_inputs(heads, K, seed=1)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    beta = 1 / (1 + np.exp(-random_inputs(H, seed=2)))
    decay = -np.exp(random_inputs(H, seed=3))
    return Recurrence(random_inputs(heads, K), k, random_inputs(H, V), decay, beta if delta else None)


def naive(inputs: Recurrence) -> tuple[np.ndarray, np.ndarray]:
    """The outputs, and the state after every token, in float64 from the formulas."""
    outputs, states = [], []
    for t in range(sum(LENGTHS)):
        state = np.zeros((H, K, V)) if t in OFFSETS else states[-1]
        q, k = (np.repeat(x[t], H // x.shape[1], axis=0).astype(np.float64) for x in (inputs.q, inputs.k))
        state = state * np.exp(inputs.decay[t])[:, None, None]
        u = inputs.v[t].astype(np.float64)
        if inputs.beta is not None:
            u = inputs.beta[t][:, None] * (u - np.einsum("hk,hkv->hv", k, state))
        states.append(state + k[:, :, None] * u[:, None, :])
        outputs.append(np.einsum("hk,hkv->hv", q, states[-1]))
    return np.stack(outputs), np.stack(states)


@pytest.mark.parametrize("delta", [True, False])
def test_a_recurrence_over_pages_is_the_definition(delta: bool) -> None:
    inputs = make_recurrence(delta, shared=True)
    fresh = np.diff(SEGMENTS, prepend=-1, axis=1) != 0
    expected, states = naive(inputs)
    packed, _ = jax.jit(recurrence.reference)(*jax.device_put((inputs, fresh)))
    np.testing.assert_allclose(packed, expected, rtol=1e-4, atol=1e-5)
    op = jax.jit(partial(paged_recurrence, block_size=BLOCK), donate_argnums=1)
    for seed in range(3):
        out, cache, rows = serve(op, inputs, jnp.full((PAGES, H, K, V), np.nan), seed)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
        for index, row in rows.items():
            for block, page in enumerate(row.table):
                if page:  # it holds the state after the block's last token
                    last = OFFSETS[index] + min((block + 1) * BLOCK, row.length) - 1
                    np.testing.assert_allclose(cache[page], states[last], rtol=1e-4, atol=1e-5)


def test_a_convolution_over_pages_is_the_definition() -> None:
    x, weight = random_inputs(C), np.random.default_rng(0).standard_normal((C, W)).astype(np.float32)
    bias = np.linspace(-1, 1, C, dtype=np.float32)
    expected = jax.jit(convolution.reference)(*jax.device_put((Convolution(x, weight, bias), SEGMENTS)))
    naive = np.stack(
        [
            sum((weight[:, W - 1 - ago] * x[t - ago] for ago in range(W) if t - ago >= OFFSETS[i]), bias)
            for i, length in enumerate(LENGTHS)
            for t in range(OFFSETS[i], OFFSETS[i] + length)
        ]
    )
    np.testing.assert_allclose(expected, naive, rtol=1e-5, atol=1e-5)

    @partial(jax.jit, donate_argnums=1)
    def op(x, cache, batch):
        return short_convolution(Convolution(x, weight, bias), cache, batch, BLOCK)

    for seed in range(3):
        out, cache, rows = serve(op, x, jnp.full((PAGES, W - 1, C), np.nan), seed)
        np.testing.assert_allclose(out, naive, rtol=1e-5, atol=1e-5)
        for index, row in rows.items():
            for block, page in enumerate(row.table):
                if page:
                    stop = min((block + 1) * BLOCK, row.length)
                    before = np.concatenate([np.zeros((W - 1, C)), x[OFFSETS[index] :][:stop]])[-(W - 1) :]
                    np.testing.assert_array_equal(cache[page], before)


def test_steps_of_single_tokens_need_no_other_program() -> None:
    """The program for decoding alone gives what the one for mixed steps gives."""
    inputs = jax.tree.map(lambda a: jnp.asarray(a[:S]), make_recurrence(True, shared=False))
    cache = jax.random.normal(jax.random.key(0), (PAGES, H, K, V))
    step = [(Row(i, 9, [3 * i + 1, 3 * i + 2, 3 * i + 3], computed), 1) for i, computed in enumerate([0, 3, 4, 7])]
    batch = jax.device_put(ragged(step))
    run = jax.jit(paged_recurrence, static_argnums=3, static_argnames="decode_only")
    alone = run(inputs, cache, batch, BLOCK, decode_only=True)
    mixed = run(inputs, cache, batch, BLOCK)
    np.testing.assert_array_equal(alone[0][:4], mixed[0][:4])
    np.testing.assert_array_equal(alone[1][1:], mixed[1][1:])
    x, weight = jnp.asarray(random_inputs(C)[:S]), jnp.ones((C, W))
    cache = jax.random.normal(jax.random.key(0), (PAGES, W - 1, C))
    run = jax.jit(short_convolution, static_argnums=3, static_argnames="decode_only")
    alone = run(Convolution(x, weight, None), cache, batch, BLOCK, decode_only=True)
    mixed = run(Convolution(x, weight, None), cache, batch, BLOCK)
    np.testing.assert_array_equal(alone[0][:4], mixed[0][:4])
    np.testing.assert_array_equal(alone[1][1:], mixed[1][1:])
