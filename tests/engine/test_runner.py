"""What warm-up finds out about the time of steps, against steps that really run."""

import time
from collections.abc import Iterator

import jax.numpy as jnp
import pytest

from tenfold.engine import runner
from tenfold.engine.config import EngineConfig
from tenfold.engine.engine import Engine
from tenfold.engine.memory import plan_cache
from tenfold.engine.request import Sequence
from tenfold.engine.runner import fetch_tokens
from tenfold.engine.sampling_params import SamplingParams
from tenfold.engine.scheduler import Chunk, Plan
from tenfold.models.family import resolve
from tenfold.runtime.engine_process import STALL_STEPS
from tests.engine.oracle import CONFIGS, VOCABULARY, tiny_model

LONG = 65536


@pytest.fixture(scope="module")
def engine(programs: None) -> Iterator[Engine]:
    """A tiny model with a context so long that attention is all that takes time."""
    model = resolve(CONFIGS["full"] | {"max_position_embeddings": LONG})
    config = EngineConfig(max_num_seqs=1, max_num_batched_tokens=32, cache_memory=2**25)
    plan = plan_cache(model, config, jnp.float32, 2**30, "cpu")
    assert plan.max_model_len == LONG
    engine = Engine(model, tiny_model("full").params, config, plan)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def slowest(engine: Engine) -> float:
    """Seconds of a step that computes the last tokens of the longest sequence, as many as fit into it."""
    seq = Sequence(
        request_id="long",
        index=0,
        tokens=[i % VOCABULARY for i in range(LONG - 1)],
        prompt_length=LONG - 1,
        params=SamplingParams(temperature=0),
        seed=(0, 0),
        eos_token_ids=frozenset(),
        max_tokens=1,
        slot=0,
        tables=[list(range(1, 1 + LONG // 32))],
    )
    plan = Plan((Chunk(seq, LONG - 33, 32, samples=True, admitted=True),))
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        fetch_tokens(engine._runner.run(plan))
        times.append(time.perf_counter() - start)
    return min(times)


def assert_foreseen(estimate: float, slowest: float) -> None:
    """No step that works is taken for one that hangs, and one that hangs is not waited for much longer than needed."""
    assert slowest < STALL_STEPS * estimate
    assert estimate < 16 * slowest


def test_the_slowest_step_is_foreseen(engine: Engine, slowest: float) -> None:
    assert max(engine._runner.step_seconds.values()) < slowest / 2  # without attention
    assert_foreseen(engine.info.longest_step_s, slowest)


def test_it_is_foreseen_from_shorter_contexts(engine: Engine, slowest: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ATTENTION_S", 0.0)
    monkeypatch.setattr(runner, "FEWEST_KEYS", LONG // 4)
    assert_foreseen(engine._runner._time_longest_step(), slowest)
