"""Offline generation, as users of vLLM know it: `LLM(model).generate(prompts, params)`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tenfold.base.adapter import base_files
from tenfold.base.builtin import builtin_model
from tenfold.base.errors import RequestError
from tenfold.base.files import TOKENIZER_FILES
from tenfold.base.storage import fetch
from tenfold.data import gguf_checkpoint
from tenfold.data.completion import CompletionText
from tenfold.data.generation_config import read_sampling_defaults
from tenfold.data.tokenizer import Tokenizer
from tenfold.engine.config import EngineConfig
from tenfold.engine.engine import Engine
from tenfold.engine.outputs import CompletionOutput, EngineOutput, RequestOutput
from tenfold.engine.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class _Job:
    """One prompt on its way: its output so far, and the text of each completion."""

    def __init__(self, request_id: str, prompt: Prompt, token_ids: list[int], params: SamplingParams, t: Tokenizer):
        self.params = params
        scored = params.logprobs is not None
        self.output = RequestOutput(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            outputs=[CompletionOutput(index=i, logprobs=[] if scored else None) for i in range(params.n)],
        )
        self._texts = [
            CompletionText(
                t,
                prompt_token_ids=token_ids,
                skip_special_tokens=params.skip_special_tokens,
                stop=tuple(params.stop),
                include_stop=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )
            for _ in range(params.n)
        ]

    def push(self, out: EngineOutput) -> int:
        """Files what a step produced; returns how many tokens it added."""
        completion = self.output.outputs[out.index]
        if out.prompt_logprobs is not None and self.output.prompt_logprobs is None:
            self.output.prompt_logprobs = list(out.prompt_logprobs)
        if completion.finish_reason is not None:  # a stop string ended it; the engine is being told
            return 0
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, out.num_cached_tokens)
        stopped = out.finish_reason == "stop"
        delta = self._texts[out.index].push(out.token_ids, final=out.finish_reason is not None, stop_token=stopped)
        completion.text += delta.text
        completion.token_ids += out.token_ids[: delta.num_tokens]
        if completion.logprobs is not None and out.logprobs is not None:
            completion.logprobs += out.logprobs[: delta.num_tokens]
        completion.finish_reason, completion.stop_reason = out.finish_reason, out.stop_reason
        if delta.stop is not None:
            completion.finish_reason, completion.stop_reason = "stop", delta.stop
        return delta.num_tokens


class LLM:
    """A model, its tokenizer and an engine in this process.

    Args:
        model: a directory, a GGUF file, a Hugging Face id, or an object-store URI, also of an adapter; None is the
            built-in model.
        tokenizer: where the tokenizer is, if not with the model.
        revision: of a Hugging Face id.
        dtype: "auto", "float32", "bfloat16" or "float16".
        quantization: "int8" or "int4" rounds the weights while they are loaded.
        kv_cache_dtype: "auto", or "int8" or "fp8" for keys and values in 8 bits.
        max_model_len: longest sequence, prompt and output together.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of a step.
        block_size: tokens of a cache page.
        cache_memory: bytes of the cache.
        enable_prefix_caching: reuse the cache of prompts with the same beginning.
        seed: of requests that bring none.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError, MemoryBudgetError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        block_size: int = 32,
        cache_memory: int | None = None,
        enable_prefix_caching: bool = True,
        seed: int = 0,
    ) -> None:
        path = builtin_model()
        if model is not None:
            path = fetch(model, revision=revision, progress=True)
            path = gguf_checkpoint.prepare(path, tokenizer=tokenizer is None)
        beside = base_files(path, progress=True)
        self.tokenizer = Tokenizer.load(
            beside.tokenizer if tokenizer is None else gguf_checkpoint.prepare(fetch(tokenizer, files=TOKENIZER_FILES))
        )
        config = EngineConfig(
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            cache_memory=cache_memory,
            enable_prefix_caching=enable_prefix_caching,
            decode_slowdown=math.inf,  # nobody waits for single tokens here
            max_waiting=2**31,
            dtype=dtype,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            seed=seed,
        )
        self.engine = Engine.from_pretrained(path, config)
        self._defaults: dict[str, Any] = dict(read_sampling_defaults(beside.model))
        self._requests = 0

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's `generation_config.json` asks for; used where no params are given."""
        return SamplingParams(**self._defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts, all together, and returns them in their order.

        Args:
            prompts: strings or lists of token ids, or one of either.
            params: for all, or one per prompt; None takes the checkpoint's own defaults.
            use_tqdm: show a progress bar.

        Raises:
            RequestError: a prompt or its parameters cannot be served; nothing has been generated.
        """
        listed = _listed(prompts)
        if params is None:
            params = self.get_default_sampling_params()
        each = list(params) if isinstance(params, Sequence) else [params] * len(listed)
        if len(each) != len(listed):
            raise RequestError(f"there are {len(listed)} prompts but {len(each)} sampling params.", param="params")
        return self._run(listed, each, use_tqdm, special_tokens=True)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or several, through the model's chat template.

        Args:
            messages: dicts with "role" and "content", or a list of such lists.
            params: for all; None takes the checkpoint's own defaults, and answers as long as the context allows.
            use_tqdm: show a progress bar.
            template_variables: passed on to the template.

        Raises:
            TokenizerError: the model has no chat template, or it refuses the messages.
            RequestError: a conversation is too long.
        """
        several: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        prompts = [self.tokenizer.apply_chat_template(m, **template_variables) for m in several]
        if params is None:
            params = SamplingParams(**{"max_tokens": None, **self._defaults})
        return self._run(prompts, [params] * len(prompts), use_tqdm, special_tokens=False)

    def _run(
        self, prompts: Sequence[Prompt], params: Sequence[SamplingParams], show: bool, *, special_tokens: bool
    ) -> list[RequestOutput]:
        jobs: dict[str, _Job] = {}
        try:
            for prompt, each in zip(prompts, params, strict=True):
                self._requests += 1
                if isinstance(prompt, str):
                    ids = self.tokenizer.encode(prompt, add_special_tokens=special_tokens)
                else:
                    ids = list(prompt)
                request_id = str(self._requests)
                job = _Job(request_id, prompt, ids, each, self.tokenizer)
                self.engine.add(request_id, ids, each)
                jobs[request_id] = job
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with Progress(*columns, disable=not show) as progress:
                self._step_until_done(jobs, progress, progress.add_task("generating", total=len(jobs)))
        finally:  # after an error or an interrupt nothing is left behind
            for request_id in jobs:
                self.engine.abort(request_id)
        return [job.output for job in jobs.values()]

    def _step_until_done(self, jobs: Mapping[str, _Job], progress: Progress, task: TaskID) -> None:
        unfinished = len(jobs)
        tokens = 0
        while unfinished:
            for out in self.engine.step():
                job = jobs[out.request_id]
                was_finished = job.output.finished
                tokens += job.push(out)
                if job.output.finished and not was_finished:
                    self.engine.abort(out.request_id)  # a stop string ends it before the engine knows
                    unfinished -= 1
                    progress.advance(task)
            elapsed = progress.tasks[task].elapsed or math.inf
            progress.update(task, description=f"generating, {tokens / elapsed:.0f} tokens/s")


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [[int(t) for t in prompts if isinstance(t, int)]]
    return [p for p in prompts if not isinstance(p, int)]
