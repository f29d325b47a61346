"""Counting compilations: those of a step are an engine's, and nothing else that the process compiles."""

import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src import monitoring

from tenfold.engine.compilations import Compilations
from tenfold.engine.sampling_params import SamplingParams
from tests.engine.conftest import make_engine


def compile_anew() -> None:
    jax.jit(lambda x: x + 1)(jnp.float32(0)).block_until_ready()


def test_only_what_a_watched_thread_compiles_counts(caplog: pytest.LogCaptureFixture) -> None:
    compilations = Compilations()
    try:
        compile_anew()
        with compilations.watched(), ThreadPoolExecutor(1) as other:
            other.submit(compile_anew).result()
        assert (compilations.count, caplog.messages) == (0, [])
        with compilations.watched():
            compile_anew()
        assert compilations.count == len(caplog.messages) > 0
        assert "please report it" in caplog.text
    finally:
        compilations.stop()


@pytest.mark.usefixtures("programs")
def test_an_engine_counts_its_steps_and_is_forgotten_with_its_counter() -> None:
    listeners = len(monitoring.get_event_duration_listeners())
    engine = make_engine("full")
    compile_anew()
    engine.add("a", [1, 2, 3], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    engine.step()
    assert engine.stats().compilations == 0
    programs = engine._runner._compiled

    def compiling(program: Any) -> Any:
        def run(*args: Any) -> Any:
            compile_anew()
            return program(*args)

        return run

    programs.update({job: compiling(program) for job, program in programs.items()})
    while engine.has_work:
        engine.step()
    assert engine.stats().compilations > 0
    del engine, programs
    gc.collect()
    assert len(monitoring.get_event_duration_listeners()) == listeners
