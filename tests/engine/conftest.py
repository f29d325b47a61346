"""Engines that are compiled once for all tests of a process."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tenfold.engine.compilations import keep_programs
from tenfold.engine.config import EngineConfig
from tenfold.engine.engine import Engine
from tenfold.engine.memory import blocks_of, plan_cache
from tests.engine.oracle import EOS, MAX_LEN, tiny_model

ENGINES = {
    # name: (model, longest sequences that the cache holds, sizes)
    "full": ("full", 1.4, EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, block_size=4, max_waiting=64)),
    "alternating": ("alternating", 1.3, EngineConfig(max_num_seqs=4, max_num_batched_tokens=24, block_size=4)),
    "sliding": ("sliding", 1.2, EngineConfig(max_num_seqs=4, max_num_batched_tokens=16, block_size=8)),
    "recurrent": (
        "recurrent",
        2.0,
        EngineConfig(max_num_seqs=3, max_num_batched_tokens=16, block_size=4, state_interval=8),
    ),
    "mamba": (
        "mamba",
        1.3,
        EngineConfig(max_num_seqs=2, max_num_batched_tokens=16, block_size=4, state_interval=8),
    ),
    "chunked": ("chunked", 1.3, EngineConfig(max_num_seqs=2, max_num_batched_tokens=16, block_size=8)),
    "sharing": ("sharing", 1.3, EngineConfig(max_num_seqs=2, max_num_batched_tokens=16, block_size=8)),
    "latent": ("latent", 1.3, EngineConfig(max_num_seqs=3, max_num_batched_tokens=16, block_size=8)),
    # a budget below the smallest bucket, three rows, pages that do not divide the longest sequence, no prefix cache
    "odd": (
        "full",
        8.0,
        EngineConfig(
            max_num_seqs=3, max_num_batched_tokens=10, block_size=16, max_model_len=50, enable_prefix_caching=False
        ),
    ),
}


KINDS = [name for name, (model, *_) in ENGINES.items() if name == model]
"""An engine for every kind of cache."""


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Engines share what they compile alike; with JAX_COMPILATION_CACHE_DIR set, sessions do too."""
    keep_programs(tmp_path_factory.mktemp("programs"))


def make_engine(name: str) -> Engine:
    """One of `ENGINES`; its cache holds so many sequences of the greatest length."""
    model_name, sequences, config = ENGINES[name]
    tiny = tiny_model(model_name)
    specs = jax.tree.leaves(tiny.model.cache_specs())
    longest = config.max_model_len or MAX_LEN
    cache_memory = sum(
        spec.page_bytes(config.block_size, jnp.float32) * (1 + blocks_of(spec.reach, longest, config) * sequences)
        for spec in specs
    )
    budget = replace(config, cache_memory=int(cache_memory))
    plan = plan_cache(tiny.model, budget, jnp.float32, 2**30, "cpu")
    return Engine(tiny.model, tiny.params, budget, plan, EOS)


@pytest.fixture(scope="session")
def engines(programs: None) -> Iterator[Callable[[str], Engine]]:
    """Makes an engine on first use; idle ones are checked for leaks in the end."""
    made: dict[str, Engine] = {}

    def get(name: str) -> Engine:
        if name not in made:
            made[name] = make_engine(name)
        return made[name]

    yield get
    for engine in made.values():
        engine.close()


@pytest.fixture(params=list(ENGINES))
def any_engine(request: pytest.FixtureRequest, engines: Callable[[str], Engine]) -> Iterator[Engine]:
    """Every kind of engine, idle before and after."""
    yield from _idle(engines(request.param))


@pytest.fixture
def engine(engines: Callable[[str], Engine]) -> Iterator[Engine]:
    """An engine with full attention and prefix caching, idle before and after."""
    yield from _idle(engines("full"))


@pytest.fixture
def odd_engine(engines: Callable[[str], Engine]) -> Iterator[Engine]:
    yield from _idle(engines("odd"))


@pytest.fixture
def sliding_engine(engines: Callable[[str], Engine]) -> Iterator[Engine]:
    yield from _idle(engines("sliding"))


def _idle(engine: Engine) -> Iterator[Engine]:
    check_idle(engine)
    yield engine
    check_idle(engine)


def check_idle(engine: Engine) -> None:
    """Nothing is left: no work, no pages in use."""
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
