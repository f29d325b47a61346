"""The engine as a model of lm-eval, the evaluation harness (Gao et al., 2024): `simple_evaluate(harness_model(llm))`.

lm-eval is imported when it is used; it is not among Tenfold's dependencies.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tenfold.base.errors import ConfigError
from tenfold.engine.llm import LLM
from tenfold.engine.outputs import RequestOutput
from tenfold.engine.sampling_params import SamplingParams

MAX_NEW_TOKENS = 256  # of a task that names no number


@runtime_checkable
class Instance(Protocol):
    """A request of lm-eval's."""

    @property
    def args(self) -> tuple[Any, ...]: ...


def harness_model(llm: LLM) -> Any:
    """An `lm_eval.api.model.LM` that answers with an engine.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    try:
        base = importlib.import_module("lm_eval.api.model").LM
    except ImportError:
        raise ConfigError("this needs the evaluation harness: pip install lm-eval") from None
    made = type("TenfoldLM", (Answers, base), {})(llm)
    base.__init__(made)
    return made


class Answers:
    """What lm-eval asks of a model: likelihoods of texts, and greedy continuations.

    Args:
        llm: answers; its prefix cache serves the choices of one question.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self._longest = llm.engine.info.max_model_len
        tokenizer = llm.tokenizer
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._begin = 0 if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Tells the caches of requests apart."""
        return "tenfold"

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt."""
        return self.llm.tokenizer.apply_chat_template(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln of the continuation's probability, and whether it is the greedy one."""
        pairs = [self._encode(*request.args) for request in requests]
        return self._score(pairs, show=not disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """For each (text,): ln of its probability, in windows as long as the context where it is longer."""
        windows = [self._windows(*request.args) for request in requests]
        scores = iter(self._score([pair for pairs in windows for pair in pairs], show=not disable_tqdm))
        return [sum(next(scores)[0] for _ in pairs) for pairs in windows]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, settings): what follows, up to the first of its stop strings."""
        prompts: list[list[int]] = []
        params: list[SamplingParams] = []
        for context, settings in (request.args for request in requests):
            params.append(_sampling(settings))
            room = self._longest - (params[-1].max_tokens or 0)
            if room < 1:
                raise ConfigError(f"the task asks for {params[-1].max_tokens} tokens; the model has {self._longest}")
            prompts.append(self.llm.tokenizer.encode(context)[-room:])
        outputs = self.llm.generate(prompts, params, use_tqdm=not disable_tqdm) if prompts else []
        return [output.outputs[0].text for output in outputs]

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Spaces at the context's end belong to the continuation, as tokens have them."""
        encode = self.llm.tokenizer.encode
        if not context:
            return [self._begin], encode(continuation, add_special_tokens=False)
        kept = context.rstrip()
        before, whole = encode(kept), encode(context + continuation)
        return before, whole[len(before) :]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """Contexts and continuations that cover a text; the last one has a whole window of context."""
        ids = self.llm.tokenizer.encode(text, add_special_tokens=False)
        size = self._longest - 1  # one token is generated, to no use
        all_ids = [self._begin, *ids]
        found: list[tuple[list[int], list[int]]] = []
        for start in range(1, len(all_ids), size - 1):
            stop = min(start + size - 1, len(all_ids))
            found.append((all_ids[max(0, stop - size) : start], all_ids[start:stop]))
        return found

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], *, show: bool) -> list[tuple[float, bool]]:
        prompts: list[list[int]] = []
        for context, continuation in pairs:
            ids = [*context, *continuation][-(self._longest - 1) :]
            if len(continuation) >= len(ids):
                raise ConfigError(f"a continuation of {len(continuation)} tokens does not fit into {self._longest}")
            prompts.append(ids)
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        outputs = self.llm.generate(prompts, params, use_tqdm=show) if prompts else []
        return [_sum(output, len(pair[1])) for output, pair in zip(outputs, pairs, strict=True)]


def _sum(output: RequestOutput, last: int) -> tuple[float, bool]:
    scored = (output.prompt_logprobs or [])[len(output.prompt_token_ids) - last :]
    return sum(t.logprob for t in scored if t is not None), all(t is None or t.rank == 1 for t in scored)


def _sampling(settings: Mapping[str, Any]) -> SamplingParams:
    """A task's settings, which have transformers' names."""
    until = settings.get("until") or []
    sampled = bool(settings.get("do_sample", False))
    return SamplingParams(
        temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
        top_p=float(settings.get("top_p", 1.0)),
        max_tokens=int(settings.get("max_gen_toks", settings.get("max_tokens", MAX_NEW_TOKENS))),
        stop=[until] if isinstance(until, str) else list(until),
    )
