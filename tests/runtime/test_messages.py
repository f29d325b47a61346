"""Messages survive the socket however it cuts them, and nothing else is accepted."""

import pickle
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.base.errors import OverloadedError, RequestError
from tenfold.engine.config import EngineConfig
from tenfold.engine.outputs import EngineOutput, EngineStats, ModelInfo, TokenLogprobs
from tenfold.engine.sampling_params import SamplingParams
from tenfold.runtime.messages import (
    Abort,
    Add,
    Fatal,
    Heartbeat,
    Launch,
    Ready,
    Rejected,
    Shutdown,
    Starting,
    Step,
    encode,
    read_commands,
    read_reports,
)

INFO = ModelInfo(
    architecture="LlamaForCausalLM",
    dtype="float32",
    device="cpu:cpu",
    num_parameters=12,
    vocab_size=260,
    max_model_len=64,
    eos_token_ids=(1, 3),
    cache_bytes=1 << 40,
    longest_step_s=0.25,
)
PARAMS = SamplingParams(
    n=2,
    temperature=0.5,
    presence_penalty=1,
    logit_bias={7: -100, 260: 0.5},
    seed=2**64 - 1,
    stop=["\n\n", "ß"],
    stop_token_ids=(5,),
    logprobs=3,
)
COMMANDS = [
    Launch("/models/größe", EngineConfig(cache_memory=1 << 34), 20),
    Add("1", [0, 259, 2**31 - 1], PARAMS, -3, "salt"),
    Add("2", [1], SamplingParams(), 0, None),
    Abort(["1", "2"]),
    Shutdown(),
]
LOGPROBS = TokenLogprobs(5, -float("inf"), 1, ((5, -0.1), (6, -2.5)))
REPORTS = [
    Starting(1, 30),
    Ready(INFO),
    Step(
        [EngineOutput("1", 1, (5, 6), (LOGPROBS, LOGPROBS), (None, LOGPROBS), "stop", 5, 16), EngineOutput("2", 0, ())]
    ),
    Heartbeat(EngineStats(steps=2**40, running=3)),
    Rejected("1", "too long", param="prompt", code="context_length_exceeded"),
    Rejected("2", "full", retry_after_s=2.5),
    Fatal("ConfigError", "no such thing"),
]


@given(st.lists(st.sampled_from(COMMANDS), max_size=6), st.data())
def test_commands_arrive_however_they_are_cut(sent, data):
    stream = b"".join(encode(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = read_commands()
    received = [
        message
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for message in reader.feed(stream[start:stop])
    ]
    assert received == sent


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: type(report).__name__)
def test_reports_arrive_byte_by_byte_with_their_types(report):
    reader = read_reports()
    frame = bytes(encode(report))
    received = [message for byte in frame for message in reader.feed(bytes([byte]))]
    assert received == [report]
    assert type(received[0]) is type(report)
    if isinstance(report, Step):
        assert isinstance(received[0].outputs[0], EngineOutput)
        assert isinstance(received[0].outputs[0].logprobs[0], TokenLogprobs)


def test_a_frame_is_a_length_and_a_msgpack_array():
    frame = bytes(encode(Starting(1, 30)))
    assert frame == b"\x00\x00\x00\x0c" + b"\x93" + b"\xa8starting" + b"\x01" + b"\x1e"


def test_sampling_params_keep_every_field():
    (received,) = read_commands().feed(bytes(encode(COMMANDS[1])))
    assert isinstance(received, Add)
    assert received.params == PARAMS
    assert received.params.stop == ("\n\n", "ß")


@pytest.mark.parametrize(
    "payload",
    [
        pickle.dumps(Shutdown()),
        msgspec.msgpack.encode(["no such kind", 1]),
        msgspec.msgpack.encode(["add", "1", ["x"], {}, 0, None]),
        msgspec.msgpack.encode(["ready", {}]),
        b"",
    ],
    ids=["pickle", "unknown kind", "wrong types", "the other end's", "empty"],
)
def test_anything_else_is_refused(payload):
    with pytest.raises(msgspec.MsgspecError):
        read_commands().feed(struct.pack(">I", len(payload)) + payload)


def test_what_cannot_be_written_raises():
    with pytest.raises(OverflowError):
        encode(Add("1", [1 << 70], SamplingParams(), 0, None))
    with pytest.raises(UnicodeEncodeError):
        encode(Add("1", [1], SamplingParams(stop=("\ud800",)), 0, None))


def test_rejections_become_the_errors_that_they_were():
    refused, full = REPORTS[4], REPORTS[5]
    assert isinstance(refused, Rejected)
    assert isinstance(full, Rejected)
    error = refused.error()
    assert isinstance(error, RequestError)
    assert (str(error), error.param, error.code) == ("too long", "prompt", "context_length_exceeded")
    overloaded = full.error()
    assert isinstance(overloaded, OverloadedError)
    assert (str(overloaded), overloaded.retry_after_s) == ("full", 2.5)
