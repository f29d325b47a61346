"""What the server's process and the engine's say to each other, and how it stands on the socket between them.

A message is a msgpack array that begins with its kind, after its length in four bytes (big endian). Each end accepts
the other's kinds only, checked against their types; nothing is ever unpickled. Request ids are the server's own and
are never used twice, so that outputs still under way when a request is aborted cannot be taken for another's.
"""

import struct
from typing import Generic, TypeVar

import msgspec

from tenfold.base.errors import OverloadedError, RequestError
from tenfold.engine.config import EngineConfig
from tenfold.engine.outputs import EngineOutput, EngineStats, ModelInfo
from tenfold.engine.sampling_params import SamplingParams

_LENGTH = struct.Struct(">I")
_ENCODER = msgspec.msgpack.Encoder()


class Launch(msgspec.Struct, frozen=True, array_like=True, tag="launch"):
    """The first message to a worker: load this checkpoint directory.

    Attributes:
        model_path, config: as `Engine.from_pretrained` takes them.
        log_level: of what tenfold logs there, to standard error.
    """

    model_path: str
    config: EngineConfig
    log_level: int


class Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """A request, with the arguments of `Engine.add`."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int
    cache_salt: str | None


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Nobody wants these requests any more."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """Close the engine and exit; what still runs is dropped."""


class Starting(msgspec.Struct, frozen=True, array_like=True, tag="starting"):
    """How many of the programs that will run are compiled."""

    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The engine is loaded and warm."""

    info: ModelInfo


class Step(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Everything that one step of the engine produced."""

    outputs: list[EngineOutput]


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag="heartbeat"):
    """The engine's loop has come round again. Sent by the loop itself, so that a stuck engine is silent."""

    stats: EngineStats


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag="rejected"):
    """`Engine.add` refused a request.

    Attributes:
        param, code: of a RequestError.
        retry_after_s: of an OverloadedError; None means that it was a RequestError.
    """

    request_id: str
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None

    def error(self) -> RequestError | OverloadedError:
        """The error that the engine raised."""
        if self.retry_after_s is not None:
            return OverloadedError(self.message, retry_after_s=self.retry_after_s)
        return RequestError(self.message, param=self.param, code=self.code)


class Fatal(msgspec.Struct, frozen=True, array_like=True, tag="fatal"):
    """The last message of a worker that gives up: the class of the error that ended it, and what it said."""

    error: str
    message: str


Command = Launch | Add | Abort | Shutdown
"""What a worker is told."""

Report = Starting | Ready | Step | Heartbeat | Rejected | Fatal
"""What a worker says."""

Message = TypeVar("Message", Command, Report)


def encode(message: Command | Report) -> bytearray:
    """The bytes of a message on the socket.

    Raises:
        OverflowError, UnicodeEncodeError: it holds an integer beyond 64 bits, or a string that is not valid Unicode.
    """
    frame = bytearray(_LENGTH.size)
    _ENCODER.encode_into(message, frame, _LENGTH.size)
    _LENGTH.pack_into(frame, 0, len(frame) - _LENGTH.size)
    return frame


class MessageReader(Generic[Message]):
    """Cuts what arrives on a socket into messages, however the socket cut it."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Message]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that these bytes complete, in order.

        Raises:
            msgspec.MsgspecError: the bytes are no message of the expected kinds.
        """
        self._buffer += data
        messages: list[Message] = []
        start = 0
        with memoryview(self._buffer) as view:
            while (body := start + _LENGTH.size) <= len(view):
                end = body + _LENGTH.unpack_from(view, start)[0]
                if end > len(view):
                    break
                with view[body:end] as frame:
                    messages.append(self._decoder.decode(frame))
                start = end
        del self._buffer[:start]
        return messages


def read_commands() -> MessageReader[Command]:
    """A reader for the worker's end."""
    return MessageReader(msgspec.msgpack.Decoder(Command))


def read_reports() -> MessageReader[Report]:
    """A reader for the server's end."""
    return MessageReader(msgspec.msgpack.Decoder(Report))
