"""The engine's hold on the device: weights, cache and token history, and the compiled programs that use them."""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tenfold.engine import programs
from tenfold.engine.buckets import SMALLEST_MIXED, bucket, row_buckets, token_buckets
from tenfold.engine.compilations import programs_directory
from tenfold.engine.config import EngineConfig
from tenfold.engine.memory import cache_dtype
from tenfold.engine.outputs import TokenLogprobs
from tenfold.engine.pages import Group
from tenfold.engine.program_cache import Job, Program, ProgramCache
from tenfold.engine.programs import PromptLogprobs, StepBatch
from tenfold.engine.request import Sequence
from tenfold.engine.sampling_params import MAX_BIAS_ENTRIES, MAX_LOGPROBS, SamplingParams
from tenfold.engine.scheduler import Chunk, Plan
from tenfold.kernels import native
from tenfold.kernels.sampling import SamplingBatch
from tenfold.models.family import Model
from tenfold.nn.param import Tree

log = logging.getLogger(__name__)

FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
INTS = ("top_k", "position", "slot", "prompt_length", "length")
TIMED_S = 0.5  # warm-up times buckets up to the first step that takes this long, and extrapolates from there
FEWEST_KEYS = 256  # it times attention over these, then over twice as many,
ATTENTION_S = 0.1  # up to the first step whose attention takes this long, and extrapolates from there


@dataclass(frozen=True)
class StepResult:
    """What a dispatched step will give, still on the device.

    Attributes:
        sampled: the chunks that sample, one per leading row of the arrays.
        rows: the row of each of them.
        tokens: [S] sampled ids.
        logprobs: of the sampled tokens, if any chunk asked.
        prompt_chunks: chunks whose prompt log-probabilities were asked for, with their first packed token.
        prompt: of every packed token, if any chunk asked.
    """

    sampled: tuple[Chunk, ...]
    rows: tuple[int, ...]
    tokens: jax.Array
    logprobs: tuple[jax.Array, ...] | None
    prompt_chunks: tuple[tuple[Chunk, int], ...]
    prompt: PromptLogprobs | None


class Runner:
    """Turns plans into device work. Nothing here waits for the device except `warm_up` and `fetch_*`."""

    def __init__(
        self, model: Model, params: Tree, config: EngineConfig, groups: SequenceOf[Group], max_len: int
    ) -> None:
        """Allocates cache and history. `params` are the unstacked weights; `groups` from `memory.plan_cache`."""
        self.config, self.model = config, model
        leaves, self._structure = jax.tree.flatten(params)
        self._weights = tuple(leaves)  # what every call takes apart: in a tuple that takes half as long as in a tree
        self._outside = {name: part for name, part in params.items() if name != "layers"}  # what logits are made by
        self._max_len = max_len
        self._reaches = tuple(group.reach for group in groups)
        pages = {group.reach: group.num_pages for group in groups}
        B = config.block_size
        self._blocks = -(-max_len // B)
        dtype = model.activation_dtype(params)
        device = self._weights[0].devices().pop()
        on_native = native.available(device)
        held = cache_dtype(config, dtype)
        self._caches = jax.tree.map(
            lambda spec: spec.make(pages[spec.reach], B, dtype, native=on_native, held=held), list(model.cache_specs())
        )
        self._history = jnp.zeros((config.max_num_seqs + 1, max_len), jnp.int32)
        # Elsewhere than on a CPU, products of fewer rows than a matrix unit has take no less time.
        self._decodes = token_buckets(1 if device.platform == "cpu" else SMALLEST_MIXED, config.max_num_seqs)
        self._mixed = token_buckets(SMALLEST_MIXED, max(config.max_num_batched_tokens, SMALLEST_MIXED))
        self._rows = row_buckets(config.max_num_seqs)
        self._num_logprobs = min(MAX_LOGPROBS, model.config.V)
        self._no_bias = {
            S: (jnp.full((S, MAX_BIAS_ENTRIES), -1, jnp.int32), jnp.zeros((S, MAX_BIAS_ENTRIES), jnp.float32))
            for S in self._rows
        }
        self._compiled: dict[Job, Callable[..., Any]] = {}
        self.step_seconds: dict[tuple[str, int], float] = {}
        self.longest_step_s = 0.0

    # --- compiling -------------------------------------------------------------------------------------------------

    def warm_up(self, report: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program for every bucket, on all cores, and times the steps; `report(done, total)`."""
        rows = sorted(self._rows, reverse=True)  # what takes longest first
        mixed, decodes = self._mixed, self._decodes
        jobs = [*(("sample", S) for S in rows), *(("mixed", T) for T in mixed), *(("decode", T) for T in decodes)]
        jobs += [("prompt_logprobs", mixed[-1]), *(("logprobs", S) for S in rows), ("admit", 0)]
        cache = ProgramCache(programs_directory(), self._weights[0].devices().pop())
        self._compiled = cache.take({job: self._program(*job) for job in jobs}, report)
        self._time_steps()
        self.longest_step_s = self._time_longest_step()

    def _program(self, name: str, size: int) -> Program:
        abstract = partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
        weights, outside, history = abstract(self._weights), abstract(self._outside), abstract(self._history)
        width, dtype = self.model.config.D, self.model.activation_dtype(self._structure.unflatten(weights))
        hidden = jax.ShapeDtypeStruct((size, width), dtype)
        ints = jax.ShapeDtypeStruct((size,), jnp.int32)
        bound: dict[str, Any] = {}
        donated: tuple[int, ...] = ()
        match name:
            case "decode" | "mixed":
                alone = name == "decode"
                kind = programs.StepKind(self._reaches, self.config.block_size, alone, 0 if alone else self._mixed[-1])
                bound = {"model": self.model, "kind": kind}
                fn, donated = _taking_leaves(programs.forward, self._structure), (1,)
                args = weights, abstract(self._caches), history, abstract(self._step_batch((), size))
            case "sample":
                fn, bound, donated = programs.sample, {"model": self.model}, (1,)
                args = outside, history, hidden, abstract(self._sampling_batch((), (), size))
            case "logprobs":
                fn, bound = programs.sampling.logprobs, {"k": self._num_logprobs}
                args = jax.ShapeDtypeStruct((size, self.model.config.V), jnp.float32), ints
            case "prompt_logprobs":
                fn, bound = programs.prompt_logprobs, {"model": self.model, "k": self._num_logprobs}
                args = outside, history, hidden, ints, ints, jax.ShapeDtypeStruct((), jnp.int32)
            case _:
                fn, donated = programs.admit, (0,)
                slot = jax.ShapeDtypeStruct((), jnp.int32)
                args = history, slot, jax.ShapeDtypeStruct((self._max_len,), jnp.int32)
        about = f"{name} {size} {sorted(bound.items())} {self._structure}"
        return Program(jax.jit(partial(fn, **bound), donate_argnums=donated), args, about)

    def _time_steps(self) -> None:
        """Times an empty step of each bucket: weights are in it, attention is not."""
        for kind, sizes in (("decode", self._decodes), ("mixed", self._mixed)):
            timed: tuple[int, float] | None = None
            for T in sizes:
                if timed and timed[1] > TIMED_S:
                    self.step_seconds[kind, T] = timed[1] * T / timed[0]
                    continue
                timed = T, _seconds(partial(self._dispatch, (), kind, T))
                self.step_seconds[kind, T] = timed[1]

    def _time_longest_step(self) -> float:
        """Seconds of the slowest step that there can be, estimated: the largest bucket, shared by as many rows as run
        at once, each at the end of the longest context, and all prompts scored.

        Rows as long as those are timed in the smallest bucket, with few keys (all of the null page) and then twice as
        many, until attention takes a while. Attention and scoring grow with the tokens, attention also with the keys.
        """
        T, largest, most_rows = self._mixed[0], self._mixed[-1], self.config.max_num_seqs
        length = min(T, max(2, largest // most_rows), self._max_len - 1)
        rows = min(most_rows, T // length)
        longest = self._max_len - 1
        longest = max(longest if reach.most is None else min(longest, reach.most + length) for reach in self._reaches)
        plain, keys = self.step_seconds["mixed", T], min(max(FEWEST_KEYS, length), longest)
        seconds = self._time_rows(rows, length, keys)
        while seconds - plain < ATTENTION_S and keys < longest:
            keys = min(2 * keys, longest)
            seconds = self._time_rows(rows, length, keys)
        attention = max(0.0, seconds - plain) * longest / keys
        scoring = max(0.0, self._time_rows(rows, length, keys, scored=True) - seconds)
        return max(self.step_seconds.values()) + (attention + scoring) * largest / T

    def _time_rows(self, rows: int, length: int, keys: int, *, scored: bool = False) -> float:
        """Seconds of a step whose rows compute the last `length` of `keys` tokens of a sequence that owns no pages."""
        seq = Sequence(
            request_id="",
            index=0,
            tokens=[],
            prompt_length=self._max_len,
            params=SamplingParams(prompt_logprobs=0 if scored else None),
            seed=(0, 0),
            eos_token_ids=frozenset(),
            max_tokens=1,
            slot=self.config.max_num_seqs,
            tables=[[] for _ in self._reaches],
        )
        plan = Plan((Chunk(seq, keys - length, length, samples=False, admitted=False),) * rows)

        def run() -> Any:
            result = self.run(plan)
            return result.tokens, result.prompt

        return _seconds(run)

    def prefill_budget(self, decodes: int) -> int:
        """Tokens that a step with this many decodes may hold without taking `decode_slowdown` times as long as they
        alone: what keeps the time between tokens short while a long prompt arrives. Always room for some prefill."""
        if not decodes:
            return self._mixed[-1]
        alone = self.step_seconds["decode", bucket(decodes, self._decodes)]
        affordable = [T for T in self._mixed if self.step_seconds["mixed", T] <= alone * self.config.decode_slowdown]
        return max([bucket(decodes + 1, self._mixed) if decodes < self._mixed[-1] else decodes, *affordable])

    # --- running ---------------------------------------------------------------------------------------------------

    def run(self, plan: Plan) -> StepResult:
        """Dispatches a step and returns without waiting for it."""
        for chunk in plan.chunks:
            if chunk.admitted:
                row = np.zeros(self._max_len, np.int32)
                row[: len(chunk.seq.tokens)] = chunk.seq.tokens
                self._history = self._compiled["admit", 0](self._history, np.int32(chunk.seq.slot), row)
        scores_prompt = [_scores_prompt(chunk) for chunk in plan.chunks]
        decode_only = plan.num_decodes == len(plan.chunks) and not any(scores_prompt)
        kind, sizes = ("decode", self._decodes) if decode_only else ("mixed", self._mixed)
        T = bucket(plan.num_tokens, sizes)
        rows = tuple(i for i, chunk in enumerate(plan.chunks) if chunk.samples)
        tokens, logits, hidden, batch = self._dispatch(plan.chunks, kind, T)
        S = len(tokens)
        scored = any(plan.chunks[i].seq.params.logprobs is not None for i in rows)
        prompt_chunks = tuple(
            (chunk, int(start))
            for chunk, start, wanted in zip(plan.chunks, batch.query_starts, scores_prompt, strict=False)
            if wanted
        )
        prompt = None
        if prompt_chunks:
            largest = self._mixed[-1]
            program = self._compiled["prompt_logprobs", largest]
            slots, positions = (np.pad(x, (0, largest - T)) for x in (batch.slots, batch.positions))
            prompt = program(self._outside, self._history, hidden, slots, positions, np.int32(plan.num_tokens))
        return StepResult(
            sampled=tuple(plan.chunks[i] for i in rows),
            rows=rows,
            tokens=tokens,
            logprobs=self._compiled["logprobs", S](logits, tokens) if scored else None,
            prompt_chunks=prompt_chunks,
            prompt=prompt,
        )

    def _dispatch(
        self, chunks: SequenceOf[Chunk], kind: str, T: int
    ) -> tuple[jax.Array, jax.Array, jax.Array, StepBatch]:
        """Runs the model and the sampler over one bucket; returns tokens, logits, all hidden states, and the batch."""
        batch = self._step_batch(chunks, T)
        self._caches, hidden, last = self._compiled[kind, T](self._weights, self._caches, self._history, batch)
        S = bucket(min(T, self.config.max_num_seqs), self._rows)
        wanted = self._sampling_batch(chunks, [chunk.samples for chunk in chunks], S)
        self._history, tokens, logits = self._compiled["sample", S](self._outside, self._history, last, wanted)
        return tokens, logits, hidden, batch

    def _step_batch(self, chunks: SequenceOf[Chunk], T: int) -> StepBatch:
        S, B = bucket(min(T, self.config.max_num_seqs), self._rows), self.config.block_size
        slots = np.full(T, self.config.max_num_seqs, np.int32)
        positions = np.zeros(T, np.int32)
        pages = np.zeros((len(self._reaches), T), np.int32)
        tables = np.zeros((len(self._reaches), S, self._blocks), np.int32)
        kv_lens = np.zeros(S, np.int32)
        starts = np.zeros(S + 1, np.int32)
        at = 0
        for row, chunk in enumerate(chunks):
            end = at + chunk.length
            slots[at:end] = chunk.seq.slot
            positions[at:end] = np.arange(chunk.start, chunk.start + chunk.length)
            blocks = positions[at:end] // B
            for group, table in enumerate(chunk.seq.tables):
                tables[group, row, : len(table)] = table
                pages[group, at:end] = tables[group, row, blocks]
            kv_lens[row] = chunk.start + chunk.length
            at = starts[row + 1] = end
        starts[len(chunks) + 1 :] = at
        return StepBatch(
            slots=slots,
            positions=positions,
            pages=tuple(pages),
            offsets=positions % B,
            block_tables=tuple(tables),
            kv_lens=kv_lens,
            query_starts=starts,
            num_decodes=np.int32(sum(chunk.length == 1 for chunk in chunks)),
            num_seqs=np.int32(len(chunks)),
            last=np.maximum(starts[1:] - 1, 0),
        )

    def _sampling_batch(self, chunks: SequenceOf[Chunk], samples: SequenceOf[bool], S: int) -> SamplingBatch:
        """The rows' wishes. Rows that do not sample are greedy and write to the padding row of the history."""
        floats = np.zeros((len(FLOATS), S), np.float32)
        floats[FLOATS.index("top_p")] = floats[FLOATS.index("repetition_penalty")] = 1.0
        ints = np.zeros((len(INTS), S), np.int32)
        ints[INTS.index("slot")] = self.config.max_num_seqs
        seeds = np.zeros((S, 2), np.uint32)
        biased: list[tuple[int, dict[int, float]]] = []
        for row, (chunk, wanted) in enumerate(zip(chunks, samples, strict=True)):
            if not wanted:
                continue
            seq, p = chunk.seq, chunk.seq.params
            end = chunk.start + chunk.length
            floats[:, row] = [getattr(p, name) for name in FLOATS]
            ints[:, row] = p.top_k, end, seq.slot, seq.prompt_length, end
            seeds[row] = seq.seed
            held_back = seq.held_back(end)
            if p.logit_bias or held_back:
                biased.append((row, dict(p.logit_bias) | dict.fromkeys(held_back, -np.inf)))
        bias_ids, bias_values = self._no_bias[S]
        if biased:
            bias_ids, bias_values = np.full(bias_ids.shape, -1, np.int32), np.zeros(bias_values.shape, np.float32)
            for row, bias in biased:
                bias_ids[row, : len(bias)] = list(bias)
                bias_values[row, : len(bias)] = list(bias.values())
        columns: dict[str, Any] = {"seed": seeds, "bias_ids": bias_ids, "bias_values": bias_values}
        columns |= zip(FLOATS, floats, strict=True)
        columns |= zip(INTS, ints, strict=True)
        return SamplingBatch(**columns)


def _seconds(run: Callable[[], Any]) -> float:
    """The shorter of two times that `run` takes until the device has what it returns."""
    seconds: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _taking_leaves(fn: Callable[..., Any], structure: Any) -> Callable[..., Any]:
    """A program of the weights' tree, as one of its leaves."""

    @wraps(fn)
    def program(weights: tuple[jax.Array, ...], *args: Any, **bound: Any) -> Any:
        return fn(structure.unflatten(weights), *args, **bound)

    return program


def _scores_prompt(chunk: Chunk) -> bool:
    """Whether the chunk holds tokens whose successors' log-probabilities were asked for."""
    return chunk.seq.params.prompt_logprobs is not None and chunk.start < chunk.seq.prompt_length - 1


def fetch_tokens(result: StepResult) -> list[tuple[Chunk, int, TokenLogprobs | None]]:
    """Waits for a step and returns each sampling chunk with its token, and the log-probabilities where asked for."""
    tokens = np.asarray(result.tokens)
    logprobs = None if result.logprobs is None else tuple(np.asarray(x) for x in result.logprobs)
    fetched: list[tuple[Chunk, int, TokenLogprobs | None]] = []
    for chunk, row in zip(result.sampled, result.rows, strict=True):
        token, asked = int(tokens[row]), chunk.seq.params.logprobs
        scored = None if logprobs is None or asked is None else _scored(token, [x[row] for x in logprobs], asked)
        fetched.append((chunk, token, scored))
    return fetched


def fetch_prompt_logprobs(result: StepResult) -> None:
    """Waits for a step and files its prompt log-probabilities with their sequences."""
    if result.prompt is None:
        return
    arrays = [np.asarray(x) for x in result.prompt]
    for chunk, first in result.prompt_chunks:
        seq, asked = chunk.seq, chunk.seq.params.prompt_logprobs
        assert asked is not None
        for i in range(min(chunk.length, seq.prompt_length - 1 - chunk.start)):
            position = chunk.start + i + 1
            seq.prompt_logprobs[position] = _scored(seq.tokens[position], [x[first + i] for x in arrays], asked)


def _scored(token: int, arrays: SequenceOf[Any], k: int) -> TokenLogprobs:
    logprob, rank, top_ids, top_logprobs = arrays
    top = tuple((int(i), float(p)) for i, p in zip(top_ids[:k], top_logprobs[:k], strict=True))
    return TokenLogprobs(token, float(logprob), int(rank), top)
