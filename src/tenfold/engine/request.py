"""A request and its sequences, as the scheduler sees them."""

import hashlib
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from tenfold.engine.outputs import FinishReason, TokenLogprobs
from tenfold.engine.sampling_params import SamplingParams


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"  # in the queue, owns nothing
    RUNNING = "running"  # owns a slot and pages
    FINISHED = "finished"  # owns nothing


@dataclass(eq=False)
class Sequence:
    """One completion on its way: the tokens known, and how many of them have been computed.

    Attributes:
        request_id, index: which completion of which request.
        tokens: prompt and output known to the host.
        prompt_length: of `tokens`.
        params, seed: how to sample; `seed` is the pair of words that the noise is drawn from.
        priority, arrival: order of service; smaller first.
        status: see `Status`.
        slot: row of the device's token history while running, else -1.
        computed: tokens whose keys and values are in the cache once every dispatched step is done.
        pending: tokens sampled by dispatched steps that the host has not seen yet.
        tables: for each layer group the page of every block; 0 where the window has passed, or no state is kept.
        dropped: for each layer group, how many leading blocks the window has passed.
        registered: for each layer group, how many leading blocks others have been able to find.
        hashes: content hash of every full block of known tokens; each covers all before it.
        root: what the first hash starts from: separates requests that must not share pages.
        cached: prompt tokens found in the prefix cache at first admission, or None before it.
        lookup: whether cached pages may stand in for computing (not when the prompt's log-probabilities are wanted).
    """

    request_id: str
    index: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    seed: tuple[int, int]
    eos_token_ids: frozenset[int]
    max_tokens: int
    priority: int = 0
    arrival: int = 0
    status: Status = Status.WAITING
    slot: int = -1
    computed: int = 0
    pending: int = 0
    tables: list[list[int]] = field(default_factory=list[list[int]])
    dropped: list[int] = field(default_factory=list[int])
    registered: list[int] = field(default_factory=list[int])
    hashes: list[bytes] = field(default_factory=list[bytes])
    root: bytes = b""
    cached: int | None = None
    lookup: bool = True
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list[TokenLogprobs | None])

    @property
    def known(self) -> int:
        """Tokens that are known somewhere: on the host, or sampled on the device and on their way."""
        return len(self.tokens) + self.pending

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def exhausted(self) -> bool:
        """Whether the tokens on their way already fill the output."""
        return self.num_output + self.pending >= self.max_tokens

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts sequences by who is served first."""
        return (self.priority, self.arrival, self.index)

    def extend_hashes(self, block_size: int) -> None:
        """Hashes every full block of known tokens that has none yet."""
        for start in range(len(self.hashes) * block_size, len(self.tokens) - block_size + 1, block_size):
            parent = self.hashes[-1] if self.hashes else self.root
            content = np.asarray(self.tokens[start : start + block_size], np.int64).tobytes()
            self.hashes.append(hashlib.blake2b(parent + content, digest_size=16).digest())

    def finish_reason(self) -> tuple[FinishReason, int | None] | None:
        """Why the last token ends the output, with the stop token that the request asked for; None to go on."""
        last = self.tokens[-1]
        if self.num_output >= self.params.min_tokens:
            if last in self.params.stop_token_ids:
                return "stop", last
            if last in self.eos_token_ids and not self.params.ignore_eos:
                return "stop", None
        return ("length", None) if self.num_output >= self.max_tokens else None

    def held_back(self, length: int) -> tuple[int, ...]:
        """Token ids that `min_tokens` forbids for the token after the first `length`."""
        if length - self.prompt_length >= self.params.min_tokens:
            return ()
        eos = () if self.params.ignore_eos else tuple(self.eos_token_ids)
        return tuple({*self.params.stop_token_ids, *eos})


def prefix_root(*parts: str | None) -> bytes:
    """The start of a hash chain: sequences share pages only if their roots are equal."""
    return hashlib.blake2b("\0".join(part or "" for part in parts).encode(), digest_size=16).digest()


def check_tokens(tokens: SequenceOf[int], vocab_size: int) -> int | None:
    """The first token id outside the vocabulary, or None."""
    return next((t for t in tokens if not 0 <= t < vocab_size), None)
