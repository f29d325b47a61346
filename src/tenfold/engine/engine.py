"""The engine: `schedule → run → commit`, one step ahead of the device."""

import logging
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tenfold.base.adapter import fetch_base, is_adapter
from tenfold.base.allocator import keep_freed_memory
from tenfold.base.errors import OverloadedError, RequestError
from tenfold.base.paths import cache_dir
from tenfold.engine.compilations import Compilations, keep_programs
from tenfold.engine.config import EngineConfig
from tenfold.engine.memory import CachePlan, free_memory, plan_cache
from tenfold.engine.outputs import EngineOutput, EngineStats, FinishReason, ModelInfo, TokenLogprobs
from tenfold.engine.pages import PageLedger
from tenfold.engine.request import Sequence, Status, check_tokens, prefix_root
from tenfold.engine.runner import Runner, StepResult, fetch_prompt_logprobs, fetch_tokens
from tenfold.engine.sampling_params import SamplingParams
from tenfold.engine.scheduler import Scheduler
from tenfold.kernels import native
from tenfold.kernels.matmul import QuantizedWeight, Weight
from tenfold.models.family import Model, resolve
from tenfold.nn import adapter_checkpoint, checkpoint
from tenfold.nn.loading import Finish
from tenfold.nn.packing import pack
from tenfold.nn.param import Param, Tree, count
from tenfold.nn.quantization import Scheme, find_scheme, quantize_param

log = logging.getLogger(__name__)


def resolve_dtype(name: str, platform: str, stored: str | None, *, fast_bfloat16: bool) -> jnp.dtype:
    """The type to compute in.

    "auto" is bfloat16 on accelerators. On a CPU it is the checkpoint's own type, `stored`, if that is bfloat16 and the
    native kernels are there to make it fast, and float32 otherwise.
    """
    if name == "auto":
        slow = platform == "cpu" and not (fast_bfloat16 and stored == "bfloat16")
        return jnp.dtype("float32" if slow else "bfloat16")
    return jnp.dtype({"half": "float16", "float": "float32"}.get(name, name))


def _finish(
    merge: Finish | None, scheme: Scheme | None, packs: bool, p: Param, weight: jax.Array | QuantizedWeight
) -> Weight:
    """What serves as the weight that was loaded: with an adapter merged into it, quantised if asked for, and repacked
    for native operations."""
    if merge is not None:
        weight = merge(p, weight)
    if scheme is not None and not isinstance(weight, QuantizedWeight):
        weight = quantize_param(p, weight, scheme)
    return pack(p, weight) if packs else weight


class Engine:
    """Serves token-id requests with one model on one device.

    Not thread-safe: one thread adds, aborts and steps. After construction nothing compiles.
    """

    def __init__(
        self,
        model: Model,
        params: Tree,
        config: EngineConfig,
        plan: CachePlan,
        eos_token_ids: SequenceOf[int] = (),
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        """Allocates the cache and compiles every program.

        Args:
            model: bound to its configuration; `params` are its unstacked weights.
            config, plan: sizes; `plan` from `plan_cache`.
            eos_token_ids: tokens that end an output.
            report: is told (done, total) while programs compile.
        """
        self._config, self._vocab_size = config, model.config.V
        self._max_len = plan.max_model_len
        self._eos = frozenset(eos_token_ids)
        self._runner = Runner(model, params, config, plan.groups, plan.max_model_len)
        self._runner.warm_up(report)
        self._scheduler = Scheduler(
            ledger=PageLedger(plan.groups, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefill_budget=self._runner.prefill_budget,
        )
        self._live: dict[str, list[Sequence]] = {}
        self._inflight: StepResult | None = None
        self._arrivals = self._steps = self._generated = 0
        self._seeds = np.random.default_rng(config.seed)
        device = jax.tree.leaves(params)[0].devices().pop()
        self.info = ModelInfo(
            architecture=model.architecture,
            dtype=model.activation_dtype(params).name,
            device=f"{device.platform}:{device.device_kind}",
            num_parameters=count(model.params()),
            vocab_size=self._vocab_size,
            max_model_len=self._max_len,
            eos_token_ids=tuple(eos_token_ids),
            cache_bytes=plan.num_bytes,
            longest_step_s=self._runner.longest_step_s,
        )
        self._compilations = Compilations()
        self._stop_counting = weakref.finalize(self, self._compilations.stop)

    @classmethod
    def from_pretrained(
        cls, path: Path, config: EngineConfig, report: Callable[[int, int], None] | None = None
    ) -> "Engine":
        """Loads a checkpoint directory, or one of an adapter, and returns an engine that is ready.

        Raises:
            CheckpointError, UnsupportedModelError, ConfigError: the checkpoint cannot be used.
            MemoryBudgetError: it will not fit; found out before loading.
        """
        keep_programs(cache_dir() / "xla")
        adapter, path = (path, fetch_base(path)) if is_adapter(path) else (None, path)
        hf = checkpoint.read_config(path)
        model = resolve(hf)
        device = jax.devices()[0]
        if device.platform == "cpu":
            keep_freed_memory()
        stored = hf.get("dtype") or hf.get("torch_dtype")
        dtype = resolve_dtype(config.dtype, device.platform, stored, fast_bfloat16=native.available(device))
        scheme = find_scheme(config.quantization)
        quantizations = checkpoint.read_quantization(path), scheme
        plan = plan_cache(model, config, dtype, free_memory(device), device.platform, *quantizations)
        model = model.with_max_len(plan.max_model_len)
        merge = None if adapter is None else adapter_checkpoint.merge_on_load(adapter, model.params())
        finish = partial(_finish, merge, scheme, native.available(device))
        params = checkpoint.load(path, model.params(), dtype, finish=finish, skipped=model.skipped())
        return cls(model, params, config, plan, checkpoint.read_eos_token_ids(path), report)

    # --- requests --------------------------------------------------------------------------------------------------

    def add(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        """Queues a request; `step` returns its outputs.

        Args:
            request_id: unique among the requests in the engine.
            prompt_token_ids: at least one token.
            params: how to sample.
            priority: smaller is served first; first come, first served within one.
            cache_salt: only requests with the same salt share cached prefixes.

        Raises:
            RequestError: the request cannot be served as it is; nothing changed.
            OverloadedError: more than `max_waiting` sequences would wait, besides those that free slots take. A request
                that finds nothing waiting is never refused, however many completions it asks for.
        """
        self._check(request_id, prompt_token_ids, params)
        waiting = self._scheduler.num_waiting
        if waiting and waiting + params.n > self._config.max_waiting + self._scheduler.num_free_slots:
            wait_s = 1.0 + waiting * max(self._runner.step_seconds.values()) / self._config.max_num_seqs
            raise OverloadedError(
                f"{waiting} sequences are waiting already. Try again later.", retry_after_s=min(60.0, wait_s)
            )
        self._arrivals += 1
        root = prefix_root(cache_salt, None if self._config.enable_prefix_caching else str(self._arrivals))
        room = self._max_len - len(prompt_token_ids)
        self._live[request_id] = [
            Sequence(
                request_id=request_id,
                index=index,
                tokens=list(prompt_token_ids),
                prompt_length=len(prompt_token_ids),
                params=params,
                seed=self._draw_seed(params.seed, index),
                eos_token_ids=self._eos,
                max_tokens=min(params.max_tokens or room, room),
                priority=priority,
                arrival=self._arrivals,
                root=root,
                lookup=params.prompt_logprobs is None,
                prompt_logprobs=[None] * len(prompt_token_ids) if params.prompt_logprobs is not None else [],
            )
            for index in range(params.n)
        ]
        for seq in self._live[request_id]:
            self._scheduler.add(seq)

    def _check(self, request_id: str, prompt: SequenceOf[int], params: SamplingParams) -> None:
        if request_id in self._live:
            raise RequestError(f"The request id {request_id!r} is in use.", param="request_id")
        if not prompt:
            raise RequestError("The prompt is empty: give it at least one token.", param="prompt")
        if len(prompt) >= self._max_len:
            raise RequestError(
                f"This model's maximum context length is {self._max_len} tokens. Your prompt has {len(prompt)}, which "
                f"leaves no room for an output. Shorten the prompt.",
                param="prompt",
                code="context_length_exceeded",
            )
        for name, tokens in (
            ("prompt", prompt), ("logit_bias", tuple(params.logit_bias)), ("stop_token_ids", params.stop_token_ids)
        ):  # fmt: skip
            wrong = check_tokens(tokens, self._vocab_size)
            if wrong is not None:
                message = f"{name} has the token id {wrong}; ids go from 0 to {self._vocab_size - 1}."
                raise RequestError(message, param=name)

    def _draw_seed(self, seed: int | None, index: int) -> tuple[int, int]:
        """Two words for a sequence: from the request's own seed and its index, or drawn."""
        if seed is None:
            high, low = self._seeds.integers(0, 2**32, 2)
            return int(high), int(low)
        mixed = np.random.SeedSequence([seed % 2**64, index]).generate_state(2)
        return int(mixed[0]), int(mixed[1])

    def abort(self, request_id: str) -> None:
        """Drops a request and gives back its pages; it produces no more outputs. Unknown ids are ignored."""
        for seq in self._live.pop(request_id, ()):
            if seq.status is not Status.FINISHED:
                self._scheduler.finish(seq)

    # --- stepping --------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._live) or self._inflight is not None

    def step(self) -> list[EngineOutput]:
        """Dispatches the next step, then waits for the one before it and returns what that produced.

        After an exception (an interrupt, say), requests that were in the engine can only be aborted.
        """
        with self._compilations.watched():
            return self._step()

    def _step(self) -> list[EngineOutput]:
        try:
            plan = self._scheduler.schedule()
            result = None if plan is None else self._runner.run(plan)
        except BaseException:
            self._scheduler.ledger.forget()  # pages are in the prefix cache from when their computation is planned
            raise
        if plan is not None:
            self._scheduler.trim()
            self._steps += 1
        previous, self._inflight = self._inflight, result
        return self._commit(previous) if previous is not None else []

    def _commit(self, result: StepResult) -> list[EngineOutput]:
        fetch_prompt_logprobs(result)
        outputs: list[EngineOutput] = []
        for chunk, token, logprobs in fetch_tokens(result):
            seq = chunk.seq
            if seq.status is Status.FINISHED:  # aborted, or ended by the step before
                continue
            self._scheduler.commit(seq, token)
            self._generated += 1
            reason = seq.finish_reason()
            if reason is not None:
                self._scheduler.finish(seq)
            outputs.append(self._output(seq, token, logprobs, reason))
        return outputs

    def _output(
        self, seq: Sequence, token: int, logprobs: TokenLogprobs | None, reason: tuple[FinishReason, int | None] | None
    ) -> EngineOutput:
        first = seq.num_output == 1
        siblings = self._live[seq.request_id]
        if reason is not None and all(s.status is Status.FINISHED for s in siblings):
            del self._live[seq.request_id]
        return EngineOutput(
            request_id=seq.request_id,
            index=seq.index,
            token_ids=(token,),
            logprobs=None if logprobs is None else (logprobs,),
            prompt_logprobs=tuple(seq.prompt_logprobs) if first and seq.prompt_logprobs else None,
            finish_reason=reason[0] if reason else None,
            stop_reason=reason[1] if reason else None,
            num_cached_tokens=siblings[0].cached or 0,  # the others find what the first has just computed
        )

    # --- health ----------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters and gauges as of the last step."""
        scheduler, counters = self._scheduler, self._scheduler.counters
        return EngineStats(
            steps=self._steps,
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            pages_used=scheduler.ledger.num_used,
            pages_total=scheduler.ledger.num_pages,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=self._generated,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            compilations=self._compilations.count,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if a page or a slot is owned by nobody, or a request is lost."""
        self._scheduler.check()
        waiting_or_running = {id(seq) for seq in self._scheduler.sequences}
        live = {id(s) for seqs in self._live.values() for s in seqs if s.status is not Status.FINISHED}
        assert waiting_or_running == live, "the scheduler and the engine disagree about what is live"

    def close(self) -> None:
        """Waits for the device and stops counting compilations."""
        if self._inflight is not None:
            self._inflight.tokens.block_until_ready()
        self._inflight = None
        self._stop_counting()
