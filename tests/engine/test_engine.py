"""The engine on tiny random models, against a loop that computes the whole sequence for every token."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.base.errors import OverloadedError, RequestError
from tenfold.engine.engine import Engine
from tenfold.engine.outputs import EngineOutput, TokenLogprobs
from tenfold.engine.sampling_params import SamplingParams
from tests.engine.conftest import ENGINES, KINDS, check_idle
from tests.engine.oracle import EOS, VOCABULARY, TinyModel, greedy, log_softmax, tiny_model

PROMPT = [5, 71, 40, 2, 93, 18, 33, 60, 7, 7, 81, 25, 46, 90, 12, 55, 30, 68, 1, 77]
FREE = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)

# beartype picks at random which element of a tuple it checks, also in what strategies build
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@dataclass
class Completion:
    """What has arrived of one completion."""

    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    finish: tuple[str, int | None] | None = None
    cached: int = 0


Results = dict[tuple[str, int], Completion]


def collect(outputs: Iterable[EngineOutput], into: Results) -> None:
    for out in outputs:
        completion = into.setdefault((out.request_id, out.index), Completion())
        assert completion.finish is None, "an output after the last"
        assert out.prompt_logprobs is None or not completion.tokens
        completion.tokens += out.token_ids
        completion.logprobs += out.logprobs or ()
        completion.prompt_logprobs = completion.prompt_logprobs or out.prompt_logprobs
        completion.cached = out.num_cached_tokens
        if out.finish_reason:
            completion.finish = out.finish_reason, out.stop_reason


def drain(engine: Engine, results: Results | None = None) -> Results:
    """Steps until nothing is left, checking the ledger after every step."""
    results = {} if results is None else results
    for _ in range(5000):
        if not engine.has_work:
            return results
        collect(engine.step(), results)
        engine.check_integrity()
    raise AssertionError("the engine does not finish")


def generate(engine: Engine, prompt: Sequence[int], params: SamplingParams, **kwargs: Any) -> list[Completion]:
    """The completions of one request, alone in the engine."""
    engine.add("alone", prompt, params, **kwargs)
    results = drain(engine)
    return [results["alone", i] for i in range(params.n)]


def step_until(engine: Engine, condition: Callable[[], bool], results: Results | None = None) -> Results:
    results = {} if results is None else results
    for _ in range(500):
        if condition():
            return results
        collect(engine.step(), results)
        engine.check_integrity()
    raise AssertionError("it does not come to that")


def assert_same_logprobs(ours: Sequence[TokenLogprobs | None], others: Sequence[TokenLogprobs | None]) -> None:
    assert len(ours) == len(others)
    for a, b in zip(ours, others, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a.token_id, a.rank, [i for i, _ in a.top]) == (b.token_id, b.rank, [i for i, _ in b.top])
            assert a.logprob == pytest.approx(b.logprob, abs=1e-5)
            assert [p for _, p in a.top] == pytest.approx([p for _, p in b.top], abs=1e-5)


# --- the invariant --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked, and when."""

    prompt: tuple[int, ...]
    params: SamplingParams
    arrives: int
    priority: int
    salt: str | None
    aborted: int | None


@st.composite
def sampling(draw: st.DrawFn) -> SamplingParams:
    max_tokens = draw(st.integers(1, 16))
    some_tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=4)
    return SamplingParams(
        n=draw(st.sampled_from([1, 1, 1, 2, 3])),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 0, 1, 20])),
        top_p=draw(st.sampled_from([1.0, 0.9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.5])),
        logit_bias=dict.fromkeys(draw(some_tokens), draw(st.sampled_from([-100.0, -1.0, 3.0]))),
        seed=draw(st.integers(0, 9)),
        max_tokens=draw(st.sampled_from([max_tokens, max_tokens, max_tokens, None])),
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=tuple(draw(some_tokens)),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, None, 0, 4])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 2])),
    )


OPENINGS = [[(i * i * step + 3 * i) % VOCABULARY for i in range(45)] for step in (1, 2, 5)]


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Prompts begin alike, so that they share pages, and end anywhere, at the end of a page too."""
    start = draw(st.sampled_from(OPENINGS))[: draw(st.sampled_from([0, 8, 16, 17, 30, 32, 45]))]
    return Request(
        prompt=(*start, *draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4))),
        params=draw(sampling()),
        arrives=draw(st.integers(0, 8)),
        priority=draw(st.sampled_from([0, 0, 0, -1, 1])),
        salt=draw(st.sampled_from([None, None, None, "salt"])),
        aborted=draw(st.sampled_from([None, None, None, 0, 1, 2, 3, 5, 8, 13, 20])),
    )


def serve(engine: Engine, asked: Sequence[Request], salt: str) -> Results:
    """All of the requests together, as they come and go."""
    results: Results = {}
    step = 0
    while engine.has_work or any(request.arrives >= step for request in asked):
        for i, request in enumerate(asked):
            if request.arrives == step:
                given = f"{salt} {request.salt}"
                engine.add(str(i), request.prompt, request.params, priority=request.priority, cache_salt=given)
            if request.aborted is not None and request.arrives + request.aborted == step:
                engine.abort(str(i))
        collect(engine.step(), results)
        engine.check_integrity()
        step += 1
        assert step < 3000, "the engine does not finish"
    return results


class Invariant:
    """Serves workloads in one engine, and every request again alone, in an engine that has nothing cached for it."""

    def __init__(self, engine: Engine, tiny: TinyModel) -> None:
        self.engine, self.tiny = engine, tiny
        self.served = 0

    def check(self, asked: Sequence[Request]) -> None:
        self.served += 1
        together = serve(self.engine, asked, f"workload {self.served}")
        check_idle(self.engine)
        for i, request in enumerate(asked):
            alone = generate(self.engine, request.prompt, request.params, cache_salt=f"alone {self.served} {i}")
            for index, whole in enumerate(alone):
                part = together.get((str(i), index), Completion())
                if part.finish is None:
                    assert request.aborted is not None
                    assert part.tokens == whole.tokens[: len(part.tokens)]
                    continue
                assert (part.tokens, part.finish) == (whole.tokens, whole.finish)
                assert_same_logprobs(part.logprobs, whole.logprobs)
                assert_same_logprobs(part.prompt_logprobs or (), whole.prompt_logprobs or ())
            if request.params.temperature == 0 or request.params.top_k == 1:
                longest = self.engine.info.max_model_len
                expected = greedy(self.tiny, request.prompt, request.params, longest)
                assert [whole.tokens for whole in alone] == [expected] * request.params.n


ONE_OF_A_KIND = ("full", "sliding", "latent", "recurrent")  # of cache; `make slow` checks all engines


def check_invariant(name: str, engine: Engine, examples: int, most: int) -> None:
    invariant = Invariant(engine, tiny_model(ENGINES[name][0]))
    before = engine.stats()

    @settings(max_examples=examples)
    @given(st.lists(requests(), min_size=2, max_size=most))
    def workloads(asked: list[Request]) -> None:
        invariant.check(asked)

    workloads()
    after = engine.stats()
    assert after.compilations == before.compilations
    if name != "odd":  # whose cache holds all that runs
        assert after.preemptions > before.preemptions
    if name != "odd":  # which keeps no prefixes
        assert after.prefix_hits > before.prefix_hits


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ONE_OF_A_KIND else pytest.mark.slow) for name in ENGINES],
)
def test_a_request_gets_the_tokens_that_it_gets_alone(name: str, engines: Callable[[str], Engine]) -> None:
    check_invariant(name, engines(name), examples=6, most=8)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ENGINES))
def test_a_request_gets_the_tokens_that_it_gets_alone_at_depth(name: str, engines: Callable[[str], Engine]) -> None:
    check_invariant(name, engines(name), examples=150, most=12)


class Visits(dict[tuple[str, int], Any]):
    """The programs of a runner; notes which were used."""

    def __getitem__(self, key: tuple[str, int]) -> Any:
        self.used = {*getattr(self, "used", ()), key}
        return super().__getitem__(key)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ONE_OF_A_KIND else pytest.mark.slow) for name in ENGINES],
)
def test_nothing_compiles_over_every_bucket(name: str, engines: Callable[[str], Engine]) -> None:
    engine = engines(name)
    runner = engine._runner
    runner._compiled = programs = Visits(runner._compiled)
    before = engine.stats().compilations
    longest = min(engine.info.max_model_len, 40)
    for length in (3, longest - 8):
        for count in (1, 2, 3, 4):
            for scored in (None, 1):
                params = replace(FREE, temperature=0.8, logprobs=scored, prompt_logprobs=scored, max_tokens=6)
                for i in range(count):
                    engine.add(str(i), [i] * length, params, cache_salt=f"{count} {scored}")
                drain(engine)
    assert programs.used == set(programs)
    assert engine.stats().compilations == before


# --- what a request may ask -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ONE_OF_A_KIND else pytest.mark.slow) for name in KINDS]
)
def test_greedy_tokens_and_their_logprobs(name: str, engines: Callable[[str], Engine]) -> None:
    params = replace(FREE, max_tokens=30, logprobs=5, prompt_logprobs=3)
    (completion,) = generate(engines(name), PROMPT, params)
    tiny = tiny_model(name)
    assert completion.tokens == greedy(tiny, PROMPT, params)
    expected = log_softmax(tiny.logits(PROMPT + completion.tokens))
    assert completion.prompt_logprobs is not None
    assert completion.prompt_logprobs[0] is None
    scored = [*completion.prompt_logprobs[1:], *completion.logprobs]
    for row, (token, score) in enumerate(zip(PROMPT[1:] + completion.tokens, scored, strict=True)):
        assert score is not None
        assert score.token_id == token
        assert score.logprob == pytest.approx(expected[row, token], abs=1e-5)
        assert score.rank == (expected[row] >= expected[row, token]).sum()
        best = np.argsort(-expected[row])[: 3 if row < len(PROMPT) - 1 else 5]
        assert [i for i, _ in score.top] == best.tolist()
        assert [p for _, p in score.top] == pytest.approx(expected[row, best], abs=1e-5)


def test_penalties_and_bias_change_what_is_greedy(engine: Engine) -> None:
    params = replace(
        FREE,
        max_tokens=24,
        repetition_penalty=1.4,
        presence_penalty=0.6,
        frequency_penalty=0.9,
        logit_bias={8: 2.5, 77: -100.0},
    )
    (completion,) = generate(engine, PROMPT, params)
    assert completion.tokens == greedy(tiny_model("full"), PROMPT, params)
    assert completion.tokens != greedy(tiny_model("full"), PROMPT, replace(FREE, max_tokens=24))


def test_a_seed_decides_the_tokens(engine: Engine) -> None:
    params = replace(FREE, temperature=1.0, seed=1, n=2)
    first = [c.tokens for c in generate(engine, PROMPT, params)]
    assert [c.tokens for c in generate(engine, PROMPT, params)] == first
    assert first[0] != first[1]
    assert [c.tokens for c in generate(engine, PROMPT, replace(params, seed=2))] != first
    unseeded = replace(params, seed=None)
    assert generate(engine, PROMPT, unseeded)[0].tokens != generate(engine, PROMPT, unseeded)[0].tokens


def free_tokens(count: int) -> list[int]:
    return greedy(tiny_model("full"), PROMPT, replace(FREE, max_tokens=count))


def forced(*tokens: int) -> dict[int, float]:
    """A bias under which one of these tokens comes next."""
    return dict.fromkeys(tokens, 100.0)


def test_output_ends_at_a_stop_token(engine: Engine) -> None:
    tokens = free_tokens(8)
    stop = next(t for t in tokens[2:] if t not in tokens[:2])
    (completion,) = generate(engine, PROMPT, replace(FREE, stop_token_ids=(stop,)))
    assert completion.tokens == tokens[: tokens.index(stop) + 1]
    assert completion.finish == ("stop", stop)


def test_output_ends_at_an_end_token(engine: Engine) -> None:
    params = replace(FREE, ignore_eos=False, logit_bias=forced(EOS[2]))
    (completion,) = generate(engine, PROMPT, params)
    assert (completion.tokens, completion.finish) == ([EOS[2]], ("stop", None))


def test_ignore_eos_goes_on(engine: Engine) -> None:
    (completion,) = generate(engine, PROMPT, replace(FREE, logit_bias=forced(EOS[2])))
    assert (completion.tokens, completion.finish) == ([EOS[2]] * 8, ("length", None))


def test_min_tokens_holds_end_and_stop_tokens_back(engine: Engine) -> None:
    params = replace(FREE, ignore_eos=False, logit_bias=forced(*EOS, 50), stop_token_ids=(50,), min_tokens=3)
    (completion,) = generate(engine, PROMPT, params)
    assert not {*EOS, 50} & {*completion.tokens[:3]}
    assert len(completion.tokens) == 4
    assert completion.tokens[3] in {*EOS, 50}
    assert completion.tokens == greedy(tiny_model("full"), PROMPT, params)


def test_a_token_past_the_end_is_not_returned(engine: Engine) -> None:
    """The step after an end token is on its way already when the token is seen."""
    params = replace(FREE, ignore_eos=False, logit_bias=forced(EOS[0]))
    engine.add("ends", PROMPT, params)
    results = step_until(engine, lambda: engine.stats().generated_tokens >= 1 and not engine.stats().running)
    assert engine.has_work
    assert engine.stats().pages_used == 0
    drain(engine, results)
    assert results["ends", 0].tokens == [EOS[0]]


@pytest.mark.parametrize("max_tokens", [None, 100])
def test_output_ends_with_the_context(engine: Engine, max_tokens: int | None) -> None:
    longest = engine.info.max_model_len
    (completion,) = generate(engine, PROMPT, replace(FREE, max_tokens=max_tokens))
    assert (len(completion.tokens), completion.finish) == (longest - len(PROMPT), ("length", None))
    assert completion.tokens == free_tokens(longest - len(PROMPT))
    (last,) = generate(engine, PROMPT * 3 + PROMPT[:3], replace(FREE, max_tokens=max_tokens))
    assert (len(last.tokens), last.finish) == (1, ("length", None))


# --- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "odd"])
def test_completions_of_a_prompt_share_its_pages(name: str, engines: Callable[[str], Engine]) -> None:
    """With prefix caching or without."""
    engine = engines(name)
    B = engine._config.block_size
    prompt = (PROMPT * 3)[: 2 * B + 1]
    engine.add("shares", prompt, replace(FREE, n=3), cache_salt=name)
    results = step_until(engine, lambda: engine.stats().running == 3)
    assert engine.stats().pages_used == 2 + 3
    drain(engine, results)
    assert {tuple(completion.tokens) for completion in results.values()} == {tuple(results["shares", 0].tokens)}
    assert [results["shares", i].cached for i in range(3)] == [0, 0, 0]  # none was there before


def test_a_second_request_finds_the_prefix(engine: Engine, odd_engine: Engine) -> None:
    before = engine.stats()
    (first,) = generate(engine, PROMPT, FREE, cache_salt="prefix")
    (second,) = generate(engine, PROMPT, FREE, cache_salt="prefix")
    (longer,) = generate(engine, [*PROMPT, 9], FREE, cache_salt="prefix")
    (other,) = generate(engine, PROMPT, FREE, cache_salt="other")
    assert [c.cached for c in (first, second, longer, other)] == [0, 16, 20, 0]  # one token is always computed
    assert first.tokens == second.tokens == other.tokens
    after = engine.stats()
    assert after.prefix_hits - before.prefix_hits == 36
    assert after.prefix_queries - before.prefix_queries == 81
    for _ in range(2):
        assert generate(odd_engine, PROMPT, FREE)[0].cached == 0


def test_prompt_logprobs_are_computed_in_spite_of_a_hit(engine: Engine) -> None:
    params = replace(FREE, prompt_logprobs=2)
    first, second = (generate(engine, PROMPT, params)[0] for _ in range(2))
    assert second.prompt_logprobs is not None
    assert len(second.prompt_logprobs) == len(PROMPT)
    assert_same_logprobs(first.prompt_logprobs or (), second.prompt_logprobs)


@pytest.mark.parametrize("steps", range(6))
def test_abort_frees_everything_at_once(engine: Engine, steps: int) -> None:
    """Before it is admitted, in its prompt, with tokens on their way."""
    engine.add("gone", PROMPT * 2, replace(FREE, n=2, max_tokens=20))
    results: Results = {}
    for _ in range(steps):
        collect(engine.step(), results)
    assert (engine.stats().pages_used > 0) == (steps > 0)
    engine.abort("gone")
    assert engine.stats().pages_used == engine.stats().running == engine.stats().waiting == 0
    engine.check_integrity()
    engine.add("gone", [4], FREE)  # the id is free again, and what is in flight is not taken for its own
    (again,) = drain(engine).values()
    assert again.tokens == greedy(tiny_model("full"), [4], FREE)
    engine.abort("unknown")


@pytest.mark.parametrize(("name", "most"), [("sliding", 3), ("alternating", 5), ("sharing", 3), ("chunked", 4)])
def test_a_window_keeps_only_its_pages(name: str, most: int, engines: Callable[[str], Engine]) -> None:
    """However long the request: of 58 tokens in pages of 8, a window of 12 sees three at most."""
    engine = engines(name)
    ledger = engine._scheduler.ledger
    limited = next(i for i, group in enumerate(ledger.groups) if group.reach.limited)
    engine.add("slides", (PROMPT * 3)[:50], FREE, cache_salt="slides")
    held: list[int] = []
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        held += [sum(page > 0 for page in seq.tables[limited]) for seq in engine._scheduler.running]
    assert max(held) <= most < 50 // ledger.block_size
    assert engine.stats().pages_used == 0


@pytest.mark.parametrize("name", list(ENGINES))
def test_caches_take_the_bytes_that_were_planned(name: str, engines: Callable[[str], Engine]) -> None:
    engine = engines(name)
    assert sum(cache.nbytes for cache in jax.tree.leaves(engine._runner._caches)) == engine.info.cache_bytes


@pytest.mark.parametrize("name", KINDS)
def test_preempted_requests_keep_their_tokens(name: str, engines: Callable[[str], Engine]) -> None:
    """Four sequences grow until the cache is full; whoever came last gives way, and loses nothing."""
    engine = engines(name)
    before = engine.stats().preemptions
    prompts = [[i, *PROMPT[:9]] for i in range(4)]
    params = replace(FREE, max_tokens=40)
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, params, cache_salt="preempted")
    results = drain(engine)
    assert engine.stats().preemptions > before
    check_idle(engine)
    for i, prompt in enumerate(prompts):
        assert results[str(i), 0].tokens == greedy(tiny_model(name), prompt, params)


# --- order ----------------------------------------------------------------------------------------------------------


def test_urgent_requests_go_first(engine: Engine) -> None:
    for i, priority in enumerate([1, 1, 0, 1, 0, -1, 1, 0]):
        engine.add(str(i), [i + 1], replace(FREE, max_tokens=3), priority=priority)
    first_seen = list(dict.fromkeys(request_id for request_id, _ in drain(engine)))
    assert first_seen == ["5", "2", "4", "7", "0", "1", "3", "6"]


def test_the_host_is_one_step_ahead(engine: Engine) -> None:
    """What a step sampled is fetched only after the next one is dispatched."""
    start = engine.stats().steps
    engine.add("ahead", PROMPT, replace(FREE, max_tokens=3))
    assert engine.step() == []
    assert engine.stats().steps == start + 1
    for n in (2, 3):
        (out,) = engine.step()
        assert len(out.token_ids) == 1
        assert engine.stats().steps == start + n
    (last,) = engine.step()
    assert last.finish_reason == "length"
    assert engine.stats().steps == start + 3  # that no fourth is needed was known
    assert not engine.has_work
    assert engine.step() == []


def test_a_long_prompt_is_computed_next_to_decodes(engine: Engine) -> None:
    """They get a token in every step meanwhile."""
    engine.add("decodes", [1, 2], replace(FREE, max_tokens=20))
    results = step_until(engine, lambda: engine.stats().generated_tokens > 0 and not engine.stats().waiting)
    engine.add("long", (PROMPT * 3)[:58], replace(FREE, max_tokens=2))
    while ("long", 0) not in results:
        before = len(results["decodes", 0].tokens) if ("decodes", 0) in results else 0
        collect(engine.step(), results)
        assert len(results["decodes", 0].tokens) == before + 1
    drain(engine, results)


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], FREE, "prompt"),
        ([1] * 64, FREE, "prompt"),
        ([1, VOCABULARY], FREE, "prompt"),
        ([-1], FREE, "prompt"),
        ([1], replace(FREE, logit_bias={VOCABULARY: 1.0}), "logit_bias"),
        ([1], replace(FREE, stop_token_ids=(VOCABULARY,)), "stop_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused(
    engine: Engine, prompt: list[int], params: SamplingParams, param: str
) -> None:
    with pytest.raises(RequestError) as refused:
        engine.add("bad", prompt, params)
    assert refused.value.param == param
    assert not engine.has_work
    if len(prompt) == 64:
        assert refused.value.code == "context_length_exceeded"
        assert "64" in str(refused.value)


def test_an_id_in_use_is_refused(engine: Engine) -> None:
    engine.add("same", [1], FREE)
    with pytest.raises(RequestError, match="same"):
        engine.add("same", [1], FREE)
    drain(engine)
    engine.add("same", [1], FREE)


def test_a_full_queue_refuses(engine: Engine) -> None:
    """It holds 64, and the four slots four more, whether those have started or will in the next step."""
    for i in range(68):
        engine.add(str(i), [1], FREE)
    with pytest.raises(OverloadedError) as refused:
        engine.add("one more", [1], FREE)
    assert 0 < refused.value.retry_after_s <= 60
    engine.step()  # four start
    assert (engine.stats().running, engine.stats().waiting) == (4, 64)
    with pytest.raises(OverloadedError, match="64 sequences are waiting already"):
        engine.add("one more", [1], FREE)
    for request_id in ("0", "67"):  # one leaves its slot, one the queue
        engine.abort(request_id)
    with pytest.raises(OverloadedError):
        engine.add("n", [1], replace(FREE, n=3))
    engine.add("n", [1], replace(FREE, n=2))
    for request_id in [*map(str, range(68)), "n"]:
        engine.abort(request_id)
    assert not engine.stats().waiting


def test_more_completions_than_the_queue_holds_are_served_when_it_is_empty(engine: Engine) -> None:
    assert len(generate(engine, [1], replace(FREE, n=80, max_tokens=2))) == 80


def test_an_interrupted_step_leaves_nothing_false_in_the_prefix_cache(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pages could be found from when they were planned, and were never computed."""

    def interrupted(plan: object) -> None:
        raise KeyboardInterrupt

    engine.add("interrupted", PROMPT, FREE, cache_salt="interrupted")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine._runner, "run", interrupted)
        engine.step()
    engine.abort("interrupted")
    (completion,) = generate(engine, PROMPT, FREE, cache_salt="interrupted")
    assert (completion.cached, completion.tokens) == (0, free_tokens(8))


def test_info_describes_the_engine(engine: Engine) -> None:
    info = engine.info
    assert (info.architecture, info.dtype, info.device) == ("LlamaForCausalLM", "float32", "cpu:cpu")
    assert (info.vocab_size, info.max_model_len, info.eos_token_ids) == (VOCABULARY, 64, EOS)
    assert info.num_parameters == sum(int(np.prod(p.shape)) for p in _leaves(tiny_model("full").params))
    assert info.longest_step_s > 0
    # 17 blocks for each of 1.4 sequences and the null page; two layers of two heads of 8 in float32
    assert info.cache_bytes == (1 + 22) * 2 * (2 * 4 * 2 * 8 * 4)


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    return [leaf for value in tree for leaf in _leaves(value)] if isinstance(tree, list) else [tree]


def test_a_prefix_is_found_where_recurrent_layers_kept_their_state(engines: Callable[[str], Engine]) -> None:
    """Every eight tokens, and not where a prompt or an output ends."""
    engine = engines("recurrent")
    (first,) = generate(engine, PROMPT, replace(FREE, max_tokens=2), cache_salt="states")
    (second,) = generate(engine, PROMPT, replace(FREE, max_tokens=2), cache_salt="states")
    (shorter,) = generate(engine, PROMPT[:15], FREE, cache_salt="states")
    assert [c.cached for c in (first, second, shorter)] == [0, 16, 8]
    assert first.tokens == second.tokens == greedy(tiny_model("recurrent"), PROMPT, replace(FREE, max_tokens=2))
    check_idle(engine)
