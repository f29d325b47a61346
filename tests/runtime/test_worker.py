"""The worker with the real engine: what it says is what the engine says, and it survives what the scripted one does."""

import asyncio
import os
import signal
from contextlib import aclosing
from pathlib import Path

import pytest

from tenfold.base.errors import CheckpointError, EngineDeadError, MemoryBudgetError, RequestError
from tenfold.engine.config import EngineConfig
from tenfold.engine.engine import Engine
from tenfold.engine.sampling_params import SamplingParams
from tenfold.runtime import EngineProcess
from tenfold.testing.tiny import write_tiny_checkpoint
from tests.runtime.waiting import until, within

pytestmark = pytest.mark.timeout(300)  # three cold starts of the engine

CONFIG = EngineConfig(max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=32, cache_memory=1 << 22)
PROMPTS = [
    list(b"import os"),
    list(b"def add(a, b):"),
    list(b"Hello"),
    list(b"0123456789" * 5),
    list(b"x"),
    list(b"the "),
]
PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=1)
ENDLESS = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(path, width=32, heads=2, kv_heads=1, max_len=1024)
    return path


def run_here(checkpoint: Path) -> dict[str, list[tuple[int, float]]]:
    """Tokens and log-probabilities of the engine in this process."""
    engine = Engine.from_pretrained(checkpoint, CONFIG)
    results: dict[str, list[tuple[int, float]]] = {str(i): [] for i in range(len(PROMPTS))}
    for i, prompt in enumerate(PROMPTS):
        engine.add(str(i), prompt, PARAMS)
    while engine.has_work:
        for output in engine.step():
            results[output.request_id] += [(lp.token_id, lp.logprob) for lp in output.logprobs or ()]
    engine.close()
    return results


async def collect(process: EngineProcess, request_id: str, prompt: list[int]) -> list[tuple[int, float]]:
    outputs = process.generate(request_id, prompt, PARAMS)
    return [(lp.token_id, lp.logprob) async for output in outputs for lp in output.logprobs or ()]


async def test_real_engine(checkpoint: Path):
    wanted = run_here(checkpoint)
    process = EngineProcess(checkpoint, CONFIG)
    await process.start()
    try:
        assert process.info is not None
        assert (process.info.architecture, process.info.eos_token_ids) == ("LlamaForCausalLM", (257, 258))
        await assert_same(process, wanted)
        with pytest.raises(RequestError, match="maximum context length"):
            await collect(process, "long", [1] * 2000)

        async with aclosing(process.generate("left", PROMPTS[0], ENDLESS)) as outputs:
            await anext(outputs)
        so_far = len(PROMPTS) * 24
        await until(lambda: process.stats.generated_tokens > so_far and process.stats.pages_used == 0)
        assert process.stats.running == 0

        async def last_output(request_id: str) -> None:
            async for _ in process.generate(request_id, PROMPTS[0], ENDLESS):
                seen.set()

        seen = asyncio.Event()
        tasks = [asyncio.create_task(last_output(f"load {i}")) for i in range(12)]
        await seen.wait()
        os.kill(process.pid or 0, signal.SIGKILL)
        with within(1.0):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDeadError) for result in results)
        await until(lambda: process.state == "ready", 200.0)
        await assert_same(process, wanted)
        assert process.stats.compilations == 0
    finally:
        await process.stop(10.0)


async def assert_same(process: EngineProcess, wanted: dict[str, list[tuple[int, float]]]) -> None:
    results = await asyncio.gather(*(collect(process, str(i), prompt) for i, prompt in enumerate(PROMPTS)))
    for i, result in enumerate(results):
        assert [token for token, _ in result] == [token for token, _ in wanted[str(i)]]
        assert [lp for _, lp in result] == pytest.approx([lp for _, lp in wanted[str(i)]], abs=1e-4)


async def test_what_the_engine_refuses_to_load_is_said_as_it_says_it(checkpoint: Path, tmp_path: Path):
    empty = EngineProcess(tmp_path, CONFIG)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        await empty.start()
    large = EngineProcess(checkpoint, EngineConfig(cache_memory=1 << 50))
    with pytest.raises(MemoryBudgetError, match="GiB are free"):
        await large.start()
