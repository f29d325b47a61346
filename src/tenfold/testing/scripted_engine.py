"""An engine that counts instead of thinking, starts at once, needs no jax, and fails on request.

`python -m tenfold.testing.scripted_engine SCRIPT FD` is a worker like `tenfold.runtime.worker`, so that a server and
its watchdog can be tested with a real process:

    EngineProcess(path, config, command=worker_command(Script(step_s=0.01)))
"""

import math
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import msgspec

from tenfold.base.errors import MemoryBudgetError, OverloadedError, RequestError
from tenfold.engine.config import EngineConfig
from tenfold.engine.outputs import EngineOutput, EngineStats, FinishReason, ModelInfo, TokenLogprobs
from tenfold.engine.sampling_params import SamplingParams
from tenfold.runtime.engine_loop import run_worker
from tenfold.runtime.messages import Launch
from tenfold.testing.byte_tokenizer import VOCAB_SIZE

PAGES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Script:
    """What a `ScriptedEngine` does besides counting. A trigger is a token that a prompt may hold.

    Attributes:
        load_s, step_s: how long loading and each step take, in seconds.
        vocab_size, max_model_len, eos_token_ids: of the model that it seems to serve.
        longest_step_s: what it says about its steps.
        starts: a file that gets a line at every start; the other settings can then tell starts apart.
        refuse_to_load: raise MemoryBudgetError instead of loading.
        crash_from: exit while loading, from this start on.
        raise_at: trigger: the step that would serve this request raises an error.
        hang_at: trigger: that step never returns.
        spin_at: trigger: steps go on but serve nobody and do not count.
        lose_at: trigger: the request is taken and forgotten.
        leak_at: trigger: its page is not given back.
    """

    load_s: float = 0.0
    step_s: float = 0.0
    vocab_size: int = VOCAB_SIZE
    max_model_len: int = 4096
    eos_token_ids: tuple[int, ...] = ()
    longest_step_s: float = 0.01
    starts: str | None = None
    refuse_to_load: bool = False
    crash_from: int | None = None
    raise_at: int | None = None
    hang_at: int | None = None
    spin_at: int | None = None
    lose_at: int | None = None
    leak_at: int | None = None


def worker_command(script: Script) -> tuple[str, ...]:
    """The program of a worker that serves a `ScriptedEngine`."""
    return (sys.executable, "-P", "-m", "tenfold.testing.scripted_engine", msgspec.json.encode(script).decode())


@dataclass(kw_only=True)
class _Completion:
    request_id: str
    index: int
    prompt: Sequence[int]
    params: SamplingParams
    max_tokens: int
    token_ids: list[int] = field(default_factory=list[int])


class ScriptedEngine:
    """Continues every prompt by counting: the token after t is t + 1 + index, modulo the vocabulary's size.

    With the byte tokenizer it says the alphabet: "abc" goes on with "defg".
    Requests end, wait, are refused and own pages as in the real engine; sampling settings make no difference.
    """

    def __init__(self, script: Script, config: EngineConfig) -> None:
        self._script = script
        self._config = config
        self._running: list[_Completion] = []
        self._waiting: list[_Completion] = []
        self._steps = self._generated = self._leaked = 0
        self.info = ModelInfo(
            architecture="Counting",
            dtype="int",
            device="none",
            num_parameters=0,
            vocab_size=script.vocab_size,
            max_model_len=script.max_model_len,
            eos_token_ids=script.eos_token_ids,
            cache_bytes=0,
            longest_step_s=script.longest_step_s,
        )

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """As `Engine.add`; `priority` and `cache_salt` make no difference."""
        room = self.info.max_model_len - len(prompt_token_ids)
        if not prompt_token_ids:
            raise RequestError("The prompt is empty: give it at least one token.", param="prompt")
        if room < 1:
            raise RequestError("The prompt is too long.", param="prompt", code="context_length_exceeded")
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) < self.info.vocab_size:
            raise RequestError("The prompt has a token id outside the vocabulary.", param="prompt")
        free_slots = self._config.max_num_seqs - len(self._running)
        if self._waiting and len(self._waiting) + params.n > self._config.max_waiting + free_slots:
            raise OverloadedError("The queue is full.", retry_after_s=2.5)
        if self._script.lose_at in prompt_token_ids:
            return
        self._waiting += [
            _Completion(
                request_id=request_id,
                index=index,
                prompt=prompt_token_ids,
                params=params,
                max_tokens=min(params.max_tokens or room, room),
            )
            for index in range(params.n)
        ]

    def abort(self, request_id: str) -> None:
        """As `Engine.abort`."""
        self._leaked += sum(self._script.leak_at in c.prompt for c in self._running if c.request_id == request_id)
        self._running = [c for c in self._running if c.request_id != request_id]
        self._waiting = [c for c in self._waiting if c.request_id != request_id]

    def step(self) -> list[EngineOutput]:
        """One token for every completion that runs."""
        if self._script.step_s:
            time.sleep(self._script.step_s)
        room = self._config.max_num_seqs - len(self._running)
        self._running += self._waiting[:room]
        del self._waiting[:room]
        triggers = {token for c in self._running for token in c.prompt}
        if self._script.spin_at in triggers:
            return []
        if self._script.raise_at in triggers:
            raise ValueError("the script says so")
        if self._script.hang_at in triggers:
            time.sleep(1e6)
        self._steps += 1
        self._generated += len(self._running)
        outputs = [self._advance(c) for c in self._running]
        self._running = [c for c, o in zip(self._running, outputs, strict=True) if o.finish_reason is None]
        return outputs

    def _advance(self, c: _Completion) -> EngineOutput:
        token = ([*c.prompt[-1:], *c.token_ids][-1] + 1 + c.index) % self.info.vocab_size
        c.token_ids.append(token)
        reason: FinishReason | None = "length" if len(c.token_ids) == c.max_tokens else None
        ends = c.params.stop_token_ids if c.params.ignore_eos else (*c.params.stop_token_ids, *self.info.eos_token_ids)
        if token in ends and len(c.token_ids) >= c.params.min_tokens:
            reason = "stop"
        first = len(c.token_ids) == 1
        return EngineOutput(
            request_id=c.request_id,
            index=c.index,
            token_ids=(token,),
            logprobs=None if c.params.logprobs is None else (self._logprobs(token, c.params.logprobs),),
            prompt_logprobs=None
            if c.params.prompt_logprobs is None or not first
            else (None, *(self._logprobs(t, c.params.prompt_logprobs) for t in c.prompt[1:])),
            finish_reason=reason,
            stop_reason=token if reason == "stop" and token in c.params.stop_token_ids else None,
        )

    def _logprobs(self, token: int, k: int) -> TokenLogprobs:
        top = tuple(((token + i) % self.info.vocab_size, -0.5 * (i + 1)) for i in range(k))
        return TokenLogprobs(token, -0.5, 1, top)

    def stats(self) -> EngineStats:
        size = self._config.block_size
        pages = sum(math.ceil((len(c.prompt) + len(c.token_ids)) / size) for c in self._running)
        return EngineStats(
            steps=self._steps,
            running=len(self._running),
            waiting=len(self._waiting),
            pages_used=pages + self._leaked,
            pages_total=PAGES,
            generated_tokens=self._generated,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError after a leak."""
        assert not self._leaked, f"{self._leaked} pages are owned by nobody"

    def close(self) -> None:
        """Does nothing: there is nothing to wait for."""


def load_script(script: Script, launch: Launch, report: Callable[[int, int], None]) -> ScriptedEngine:
    """Loads as the script says.

    Raises:
        MemoryBudgetError: if it says so.
    """
    starts = 1
    if script.starts is not None:
        with Path(script.starts).open("a") as file:
            file.write(f"{os.getpid()}\n")
        starts = len(Path(script.starts).read_text().splitlines())
    report(0, 1)
    time.sleep(script.load_s)
    if script.crash_from is not None and starts >= script.crash_from:
        os._exit(3)
    if script.refuse_to_load:
        raise MemoryBudgetError("The model needs 3 GiB, and 2 GiB are free. Choose a smaller one.")
    report(1, 1)
    return ScriptedEngine(script, launch.config)


def main() -> int:
    """Runs the worker; returns its exit status."""
    script = msgspec.json.decode(sys.argv[1], type=Script)
    return run_worker(socket.socket(fileno=int(sys.argv[2])), partial(load_script, script))


if __name__ == "__main__":
    sys.exit(main())
