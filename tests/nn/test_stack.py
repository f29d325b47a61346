"""Scanned and unrolled layers compute the same."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.nn import param as params
from tenfold.nn.param import param
from tenfold.nn.stack import period, run_layers, stack_layers


@given(pattern=st.lists(st.integers(0, 2), min_size=1, max_size=5), length=st.integers(1, 17))
def test_period_is_the_shortest_that_repeats(pattern: list[int], length: int) -> None:
    kinds = [pattern[i % len(pattern)] for i in range(length)]
    found = period(kinds)
    repeats = [n for n in range(1, length + 1) if (kinds[:n] * length)[:length] == kinds]
    assert found == repeats[0]
    assert found <= len(pattern)


def block(x: jax.Array, p: dict, kind: str, cache: int | None) -> tuple[jax.Array, int | None]:
    act = jnp.tanh if kind == "wide" else jax.nn.relu
    return x + act(x @ p["w"] + p["b"][None]), None if cache is None else cache + 1


@partial(jax.jit, static_argnames=("block", "kinds", "sources"))
def run(block: Any, layers: Any, kinds: tuple[str, ...], x: jax.Array, caches: Any = None, **given: Any) -> Any:
    return run_layers(block, layers, kinds, x, caches, **given)


def declare(num_layers: int) -> list[dict]:
    return [
        {"w": param((4, 4), "embed mlp", f"{i}.w", scale=0.5), "b": param((4,), "mlp", f"{i}.b", scale=0.5)}
        for i in range(num_layers)
    ]


KINDS = [
    ["near"],
    ["near"] * 4,
    ["near", "near", "wide"] * 2,
    ["near", "wide", "near", "wide", "near"],  # the last repetition is cut short
    ["near", "near", "near", "wide"],  # nothing repeats
    ["wide", "near", "near", "near"],  # the first is unlike the others
]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "".join(kind[0] for kind in kinds))
def test_scanning_is_unrolling(kinds: list[str]) -> None:
    declared, key = declare(len(kinds)), jax.random.key(1)
    unrolled = params.initialize(declared, key, "float32")
    scanned = params.initialize(stack_layers(declared, kinds), key, "float32")
    x = jax.random.normal(jax.random.key(2), (3, 4))

    @jax.jit
    def one_by_one(layers: list[dict]) -> jax.Array:
        out = x
        for p, kind in zip(layers, kinds, strict=True):
            out = block(out, p, kind, None)[0]
        return out

    expected = one_by_one(unrolled)
    for layers in (unrolled, scanned):
        out, caches = run(block, layers, tuple(kinds), x)
        np.testing.assert_allclose(out, expected, rtol=1e-5)
        assert caches == [None] * len(kinds)


def test_gradients_are_the_same() -> None:
    kinds = ["near", "wide", "near", "wide", "near"]
    x = jax.random.normal(jax.random.key(2), (3, 4))
    unrolled, scanned = (
        jax.jit(jax.grad(lambda layers: run_layers(block, layers, kinds, x)[0].sum()))(
            params.initialize(declared, jax.random.key(1), "float32")
        )
        for declared in (declare(5), stack_layers(declare(5), kinds))
    )
    for i in range(4):
        np.testing.assert_allclose(unrolled[i]["w"], scanned["scan"][i % 2]["w"][i // 2], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(unrolled[4]["b"], scanned["tail"][0]["b"], rtol=1e-4)


def test_caches_pass_through_unrolled_layers_and_stacked_ones_take_none() -> None:
    kinds = ["near"] * 3
    x = jnp.ones((1, 4))
    unrolled = params.initialize(declare(3), jax.random.key(0), "float32")
    assert run_layers(block, unrolled, kinds, x, [10, 20, 30])[1] == [11, 21, 31]
    scanned = params.initialize(stack_layers(declare(3), kinds), jax.random.key(0), "float32")
    with pytest.raises(ValueError, match="serve with unstacked"):
        run_layers(block, scanned, kinds, x, [10, 20, 30])


def summing(x: jax.Array, p: dict, kind: str, cache: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Adds up what it got before it, and its own input where it keeps a cache."""
    kept = cache if kind == "reads" else x @ p["w"] + (0 if cache is None else cache)
    assert kept is not None
    return x + jnp.tanh(kept + p["b"][None]), kept


SOURCES = (None, None, 0, 1, 1)
SHARING = ("own", "own", "reads", "reads", "reads")


def test_layers_with_a_source_read_the_cache_that_it_updated() -> None:
    weights = params.initialize(declare(5), jax.random.key(1), "float32")
    x = jax.random.normal(jax.random.key(2), (3, 4))
    given = [jnp.full((3, 4), 0.5), jnp.full((3, 4), -0.5), None, None, None]

    @jax.jit
    def one_by_one(weights: list[dict]) -> tuple[jax.Array, list[jax.Array]]:
        out, kept = x, []
        for p, source, cache in zip(weights, SOURCES, given, strict=True):
            kept.append(out @ p["w"] + cache if source is None else kept[source])
            out = out + jnp.tanh(kept[-1] + p["b"][None])
        return out, kept

    expected, kept = one_by_one(weights)
    out, caches = run(summing, weights, SHARING, x, given, sources=SOURCES)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert caches[2:] == [None] * 3
    for mine, wanted in zip(caches[:2], kept[:2], strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-5)


def test_stacked_layers_share_too() -> None:
    key, x = jax.random.key(1), jax.random.normal(jax.random.key(2), (3, 4))
    unrolled = params.initialize(declare(5), key, "float32")
    scanned = params.initialize(stack_layers(declare(5), SHARING), key, "float32")
    out, _ = run(summing, scanned, SHARING, x, sources=SOURCES)
    np.testing.assert_allclose(out, run(summing, unrolled, SHARING, x, sources=SOURCES)[0], rtol=1e-5)
    alike = ("own",) * 5
    scanned = params.initialize(stack_layers(declare(5), alike), key, "float32")
    out, _ = run(summing, scanned, alike, x, sources=SOURCES)
    np.testing.assert_allclose(out, run(summing, unrolled, alike, x, sources=SOURCES)[0], rtol=1e-5)
