"""Nothing is lost, doubled or reordered on the way to a slow consumer, and what waits for it is bounded."""

import asyncio
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.errors import EngineDeadError
from tenfold.engine.outputs import EngineOutput, TokenLogprobs
from tenfold.runtime.output_stream import OutputStream, merge_outputs


def output(index: int, *token_ids: int, finish: bool = False, logprobs: bool = False) -> EngineOutput:
    return EngineOutput(
        "7",
        index,
        token_ids,
        logprobs=tuple(TokenLogprobs(t, -1.0, 1) for t in token_ids) if logprobs else None,
        finish_reason="length" if finish else None,
    )


@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    takes=st.floats(0.0, 0.9),
    logprobs=st.booleans(),
)
def test_every_token_arrives_once_and_in_order(lengths, order, takes, logprobs):
    queue = [index for index, length in enumerate(lengths) for _ in range(length)]
    order.shuffle(queue)
    sent = [0] * len(lengths)
    received: dict[int, list[EngineOutput]] = {index: [] for index in range(len(lengths))}

    async def run() -> None:
        stream = OutputStream("mine", len(lengths))
        waiting: set[int] = set()
        for step, index in enumerate(queue):
            sent[index] += 1
            last = stream.put(output(index, sent[index], finish=sent[index] == lengths[index], logprobs=logprobs))
            assert last == (step == len(queue) - 1)
            waiting.add(index)
            while waiting and order.random() < takes:
                taken = await stream.get()
                assert taken is not None
                received[taken.index].append(taken)
                waiting.remove(taken.index)  # at most one output per completion ever waits
        while (taken := await stream.get()) is not None:
            received[taken.index].append(taken)
        assert await stream.get() is None

    asyncio.run(run())
    for index, length in enumerate(lengths):
        merged = received[index]
        assert {o.request_id for o in merged} == {"mine"}
        assert [t for o in merged for t in o.token_ids] == list(range(1, length + 1))
        assert [o.finish_reason for o in merged] == [None] * (len(merged) - 1) + ["length"]
        if logprobs:
            assert [p.token_id for o in merged for p in o.logprobs or ()] == list(range(1, length + 1))
        else:
            assert all(o.logprobs is None for o in merged)


def test_merging_keeps_what_is_said_once():
    prompt_logprobs = (None, TokenLogprobs(3, -0.5, 1))
    first = output(0, 1)._replace(prompt_logprobs=prompt_logprobs, num_cached_tokens=16)
    last = output(0, 3)._replace(finish_reason="stop", stop_reason=3)
    merged = merge_outputs([first, output(0, 2), last])
    assert merged == EngineOutput("7", 0, (1, 2, 3), None, prompt_logprobs, "stop", 3, 16)


async def test_a_backlog_holds_no_more_than_its_tokens():
    stream = OutputStream("mine", 1)
    for token in range(100_000):
        stream.put(output(0, token))
    assert sum(sys.getsizeof(o.token_ids) for o in stream._pending[0]) < 100_000 * 8 + 64 * 100
    taken = await stream.get()
    assert taken is not None
    assert taken.token_ids == tuple(range(100_000))


async def test_get_waits_and_survives_being_cancelled():
    stream = OutputStream("mine", 1)
    impatient = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    patient = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    assert not patient.done()
    stream.put(output(0, 5, finish=True))
    assert (await patient) == EngineOutput("mine", 0, (5,), finish_reason="length")
    assert await stream.get() is None


async def test_an_error_comes_after_what_was_produced_before_it():
    stream = OutputStream("mine", 2)
    stream.put(output(1, 5))
    stream.close(EngineDeadError("gone"))
    taken = await stream.get()
    assert taken is not None
    assert taken.token_ids == (5,)
    with pytest.raises(EngineDeadError, match="gone"):
        await stream.get()


async def test_a_waiting_consumer_hears_of_the_end():
    for end in (OutputStream.close, OutputStream.drop):
        stream = OutputStream("mine", 1)
        waiting = asyncio.create_task(stream.get())
        await asyncio.sleep(0)
        end(stream)
        assert await waiting is None


async def test_dropping_forgets_what_waits():
    stream = OutputStream("mine", 1)
    stream.put(output(0, 5))
    stream.drop()
    assert await stream.get() is None


async def test_outputs_keep_their_distance_and_lose_nothing():
    stream = OutputStream("mine", 1, lambda: 0.05)
    loop = asyncio.get_running_loop()
    taken: list[tuple[float, tuple[int, ...]]] = []

    async def consume() -> None:
        while (got := await stream.get()) is not None:
            taken.append((loop.time(), got.token_ids))

    consumer = asyncio.create_task(consume())
    for token in range(40):
        stream.put(output(0, token))
        await asyncio.sleep(0.005)
    stream.put(output(0, 40, finish=True))
    await consumer
    assert [token for _, tokens in taken for token in tokens] == list(range(41))
    assert taken[0][1] == (0,)  # the first does not wait
    beats = [at // 0.05 for at, _ in taken[:-1]]  # and neither does the last
    assert all(a < b for a, b in pairwise(beats))


@pytest.mark.parametrize("error", [None, EngineDeadError("dead")])
async def test_nothing_that_ends_a_stream_waits(error):
    stream = OutputStream("mine", 2, lambda: 3600.0)
    stream.put(output(0, 1))
    assert (await stream.get()).token_ids == (1,)
    stream.put(output(0, 2))
    waiting = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    if error is None:
        stream.put(output(1, 1, finish=True))
        assert (await waiting).token_ids == (2,)
        assert (await stream.get()).finish_reason == "length"
    else:
        stream.close(error)
        assert (await waiting).token_ids == (2,)
        with pytest.raises(EngineDeadError):
            await stream.get()


async def test_an_interval_merges_what_comes_within_it():
    stream = OutputStream("mine", 1, lambda: 0.2)
    stream.put(output(0, 1))
    first = await stream.get()  # does not wait
    assert first is not None
    assert first.token_ids == (1,)
    taken = asyncio.get_running_loop().time()
    for token in (2, 3, 4):
        stream.put(output(0, token))
    second = await stream.get()
    assert second is not None
    assert second.token_ids == (2, 3, 4)
    assert asyncio.get_running_loop().time() // 0.2 > taken // 0.2


async def test_streams_of_one_interval_wake_their_consumers_together():
    time = asyncio.get_running_loop().time
    while time() % 1.0 > 0.5:  # far from the next beat
        await asyncio.sleep(0.01)
    streams = [OutputStream(str(i), 1, lambda: 1.0) for i in range(3)]
    for stream in streams:
        stream.put(output(0, 1))
        await stream.get()
        await asyncio.sleep(0.05)
        stream.put(output(0, 2))

    async def when(stream: OutputStream) -> float:
        await stream.get()
        return time()

    beats = {at // 1.0 for at in await asyncio.gather(*map(when, streams))}
    assert len(beats) == 1


async def test_an_end_does_not_wait_for_the_interval():
    for end in ("finish", "error", "drop"):
        stream = OutputStream("mine", 1, lambda: 600.0)
        stream.put(output(0, 1))
        await stream.get()
        waiting = asyncio.create_task(stream.get())
        await asyncio.sleep(0)
        stream.put(output(0, 2))
        await asyncio.sleep(0)
        assert not waiting.done()
        if end == "finish":
            stream.put(output(0, 3, finish=True))
            last = await waiting
            assert last is not None
            assert last.token_ids == (2, 3)
        elif end == "error":
            stream.close(EngineDeadError("gone"))
            last = await waiting
            assert last is not None
            assert last.token_ids == (2,)
            with pytest.raises(EngineDeadError):
                await stream.get()
        else:
            stream.drop()
            assert await waiting is None


async def test_waiting_for_the_interval_survives_being_cancelled():
    stream = OutputStream("mine", 1, lambda: 0.2)
    stream.put(output(0, 1))
    await stream.get()
    stream.put(output(0, 2))
    impatient = asyncio.create_task(stream.get())
    await asyncio.sleep(0)
    impatient.cancel()
    with pytest.raises(asyncio.CancelledError):
        await impatient
    stream.put(output(0, 3))
    taken = await stream.get()
    assert taken is not None
    assert taken.token_ids == (2, 3)
