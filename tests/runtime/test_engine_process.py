"""The server's view of an engine that works: outputs, refusals, cancellation, slow consumers, draining."""

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
import uvloop

from tenfold.base.errors import EngineDeadError, OverloadedError, RequestError
from tenfold.engine.config import EngineConfig
from tenfold.engine.outputs import EngineOutput, TokenLogprobs
from tenfold.engine.sampling_params import SamplingParams
from tenfold.runtime import EngineProcess
from tenfold.testing.scripted_engine import Script, worker_command
from tests.runtime.waiting import until, within


async def collect(engine: EngineProcess, request_id: str, prompt: list[int], params: SamplingParams):
    """Every output of a request."""
    return [output async for output in engine.generate(request_id, prompt, params)]


def tokens(outputs: list[EngineOutput], index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.token_ids]


async def test_outputs_of_many_requests_reach_those_who_asked(engine):
    process = await engine(config=EngineConfig(max_num_seqs=8))
    params = SamplingParams(max_tokens=20, n=2)
    results = await asyncio.gather(*(collect(process, f"request {i}", [i], params) for i in range(40)))
    for i, outputs in enumerate(results):
        assert {output.request_id for output in outputs} == {f"request {i}"}
        assert tokens(outputs, 0) == [i + k for k in range(1, 21)]
        assert tokens(outputs, 1) == [i + 2 * k for k in range(1, 21)]
        assert sorted(o.index for o in outputs if o.finish_reason == "length") == [0, 1]
    await until(lambda: process.stats.generated_tokens == 40 * 2 * 20)
    assert (process.stats.running, process.stats.waiting, process.stats.pages_used) == (0, 0, 0)


async def test_every_field_of_an_output_arrives(engine):
    process = await engine()
    params = SamplingParams(max_tokens=9, stop_token_ids=(12,), logprobs=2, prompt_logprobs=0)
    outputs = await collect(process, "r", [9, 10], params)
    logprobs = tuple(lp for output in outputs for lp in output.logprobs or ())
    assert tokens(outputs) == [11, 12]
    assert logprobs == (
        TokenLogprobs(11, -0.5, 1, ((11, -0.5), (12, -1.0))),
        TokenLogprobs(12, -0.5, 1, ((12, -0.5), (13, -1.0))),
    )
    assert outputs[0].prompt_logprobs == (None, TokenLogprobs(10, -0.5, 1))
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", 12)


async def test_state_and_figures(engine, tmp_path):
    process = await engine(start=False)
    assert (process.state, process.healthy, process.info, process.pid) == ("stopped", False, None, None)
    starting = asyncio.create_task(process.start())
    await until(lambda: process.state == "starting")
    assert not process.healthy
    await starting
    assert (process.state, process.healthy, process.restarts, process.failure) == ("ready", True, 0, None)
    assert process.info is not None
    assert process.info.architecture == "Counting"
    with pytest.raises(RuntimeError, match="already"):
        await process.start()
    await process.stop(1.0)
    assert (process.state, process.healthy, process.pid) == ("stopped", False, None)


async def test_progress_of_loading_is_reported(tmp_path):
    told: list[tuple[int, int]] = []
    process = EngineProcess(
        tmp_path, EngineConfig(), report=lambda *done: told.append(done), command=worker_command(Script())
    )
    await process.start()
    await process.stop(0.0)
    assert told == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], SamplingParams(), "prompt"),
        ([1 << 40], SamplingParams(), "prompt"),
        ([1] * 5000, SamplingParams(), "prompt"),
        ([1 << 80], SamplingParams(), None),
        ([1], SamplingParams(stop=("\ud800",)), None),
    ],
    ids=["empty", "out of vocabulary", "too long", "beyond 64 bits", "not Unicode"],
)
async def test_what_cannot_be_served_is_a_request_error(engine, prompt, params, param):
    process = await engine()
    with pytest.raises(RequestError) as caught:
        await collect(process, "r", prompt, params)
    assert caught.value.param == param
    assert tokens(await collect(process, "r", [5], SamplingParams(max_tokens=1))) == [6]


async def test_a_request_id_is_used_once_at_a_time(engine):
    process = await engine(Script(step_s=0.01))
    async with aclosing(process.generate("r", [1], SamplingParams(max_tokens=4000))) as first:
        await anext(first)
        with pytest.raises(RequestError, match="in use"):
            await collect(process, "r", [1], SamplingParams())
    assert tokens(await collect(process, "r", [1], SamplingParams(max_tokens=2))) == [2, 3]


async def test_the_engines_full_queue_is_overload(engine):
    process = await engine(Script(step_s=0.01), config=EngineConfig(max_num_seqs=1, max_waiting=1))
    async with aclosing(process.generate("r", [1], SamplingParams(n=2, max_tokens=4000))) as first:
        await anext(first)
        with pytest.raises(OverloadedError) as caught:
            await collect(process, "too many", [1], SamplingParams(n=3))
        assert caught.value.retry_after_s == 2.5


async def test_more_requests_than_the_engine_may_hold_are_refused_at_once(engine):
    process = await engine(Script(step_s=0.01), config=EngineConfig(max_num_seqs=2, max_waiting=3))
    params = SamplingParams(max_tokens=4000)
    waiting = [asyncio.create_task(collect(process, str(i), [1], params)) for i in range(5)]
    await until(lambda: process.stats.running + process.stats.waiting == 5)
    with pytest.raises(OverloadedError):
        await collect(process, "sixth", [1], params)
    for task in waiting:
        task.cancel()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*waiting, return_exceptions=True))
    await until(lambda: process.stats.running + process.stats.waiting == 0)


@pytest.mark.parametrize("way", ["cancel", "close", "abort", "drop"])
async def test_giving_up_frees_the_pages_in_the_engine(engine, way):
    process = await engine(Script(step_s=0.005))
    params = SamplingParams(max_tokens=4000, n=3)
    if way == "cancel":
        task = asyncio.create_task(collect(process, "r", [1], params))
        await until(lambda: process.stats.running == 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif way == "abort":
        task = asyncio.create_task(collect(process, "r", [1], params))
        await until(lambda: process.stats.running == 3)
        process.abort("r")
        assert all(output.finish_reason is None for output in await task)
    else:
        generator = process.generate("r", [1], params)
        await anext(generator)
        await until(lambda: process.stats.running == 3)
        if way == "close":
            await generator.aclose()
        else:
            del generator  # the event loop closes what nobody holds any more
    took = await until(lambda: process.stats.running == 0 and process.stats.pages_used == 0)
    assert took < 2.0
    process.abort("r")
    process.abort("never seen")


async def test_half_of_many_requests_disconnect_and_nothing_is_left(engine):
    process = await engine(Script(step_s=0.001), config=EngineConfig(max_num_seqs=16))

    async def client(i: int) -> int:
        received = 0
        async with aclosing(process.generate(str(i), [1], SamplingParams(max_tokens=30))) as outputs:
            async for output in outputs:
                received += len(output.token_ids)
                if i % 2 and received >= i % 29:
                    break
        assert i % 2 or received == 30
        return received

    received = sum(await asyncio.gather(*(client(i) for i in range(200))))
    await until(lambda: process.stats.generated_tokens >= received and process.stats.pages_used == 0)
    assert (process.stats.running, process.stats.waiting) == (0, 0)
    await process.stop(5.0)


async def test_a_slow_consumer_gets_merged_output_and_holds_nobody_up(engine):
    process = await engine(Script(step_s=0.0005))
    slow = process.generate("slow", [1], SamplingParams(max_tokens=3000, logprobs=0))
    first = await anext(slow)
    with within(10.0):
        fast = await collect(process, "fast", [1], SamplingParams(max_tokens=50))
    assert tokens(fast) == list(range(2, 52))
    await until(lambda: process.stats.generated_tokens == 3050, 30.0)
    rest = [output async for output in slow]
    received = tokens([first, *rest])
    assert received == [(2 + k) % 262 for k in range(3000)]
    assert sum(len(output.logprobs or ()) for output in [first, *rest]) == 3000
    assert len(rest) == 1


async def test_stop_drains_what_is_in_flight_and_takes_no_more(engine):
    process = await engine(Script(step_s=0.01))
    outputs = process.generate("r", [1], SamplingParams(max_tokens=40))
    received = tokens([await anext(outputs)])
    stopping = asyncio.create_task(process.stop(20.0))
    await until(lambda: process.state == "draining")
    assert process.healthy
    with pytest.raises(EngineDeadError, match="draining"):
        await collect(process, "late", [1], SamplingParams())
    received += tokens([output async for output in outputs])
    assert received == list(range(2, 42))
    with within(5.0):
        await stopping
    assert process.state == "stopped"


async def test_stop_waits_no_longer_than_told(engine):
    process = await engine(Script(step_s=0.01))
    task = asyncio.create_task(collect(process, "r", [1], SamplingParams(max_tokens=4000)))
    await until(lambda: process.stats.running == 1)
    with within(5.0):
        await process.stop(0.2)
    with pytest.raises(EngineDeadError, match="shut down"):
        await task


async def test_a_second_stop_does_not_wait_for_the_drain(engine):
    process = await engine(Script(step_s=0.01))
    task = asyncio.create_task(collect(process, "r", [1], SamplingParams(max_tokens=4000)))
    await until(lambda: process.stats.running == 1)
    first = asyncio.create_task(process.stop(600.0))
    await until(lambda: process.state == "draining")
    with within(5.0):
        await process.stop(0.0)
        await first
    assert process.state == "stopped"
    with pytest.raises(EngineDeadError):
        await task


async def test_leaked_pages_are_reported_at_the_end(engine, caplog):
    process = await engine(Script(step_s=0.01, leak_at=7))
    async with aclosing(process.generate("r", [7], SamplingParams(max_tokens=4000))) as outputs:
        await anext(outputs)
    await process.stop(5.0)
    assert "did not end cleanly: its exit status is 1" in caplog.text


async def test_it_can_be_started_again(engine):
    process = await engine()
    await process.stop(1.0)
    await process.start()
    assert tokens(await collect(process, "r", [1], SamplingParams(max_tokens=1))) == [2]


def test_uvloop_serves_as_well(tmp_path: Path):
    async def run() -> None:
        process = EngineProcess(tmp_path, EngineConfig(), command=worker_command(Script(step_s=0.001)))
        await process.start()
        params = SamplingParams(max_tokens=20)
        results = await asyncio.gather(*(collect(process, str(i), [i], params) for i in range(16)))
        assert [tokens(outputs) for outputs in results] == [[i + k for k in range(1, 21)] for i in range(16)]
        large = await collect(process, "large", list(range(262)) * 10, SamplingParams(max_tokens=1, prompt_logprobs=20))
        assert len(large[0].prompt_logprobs or ()) == 2620
        await process.stop(5.0)

    uvloop.run(run())
