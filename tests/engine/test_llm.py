"""Offline generation on a tiny checkpoint, against the plain model and bytes read by hand."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tenfold import LLM, SamplingParams
from tenfold.base.errors import RequestError, TokenizerError
from tenfold.engine.outputs import RequestOutput, TokenLogprobs
from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tenfold.testing.byte_tokenizer import BOS_ID, END_ID, EOS_ID, SPECIAL_TOKENS, VOCAB_SIZE
from tenfold.testing.tiny import write_tiny_checkpoint
from tests.engine.conftest import check_idle
from tests.engine.oracle import TinyModel, log_softmax

MAX_LEN = 96
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
ASCII = dict.fromkeys(range(128, VOCAB_SIZE), -100)  # a bias under which every token is a character
USER, ASSISTANT = (256 + SPECIAL_TOKENS.index(f"<|{role}|>") for role in ("user", "assistant"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that asks for five greedy tokens by default."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(path, width=32, max_len=MAX_LEN)
    file = path / "generation_config.json"
    asks = {"do_sample": False, "max_new_tokens": 5}
    file.write_text(json.dumps(json.loads(file.read_text()) | asks))
    return path


@pytest.fixture(scope="module")
def tiny(directory: Path) -> TinyModel:
    model = resolve(checkpoint.read_config(directory))
    return TinyModel(model, checkpoint.load(directory, model.params(), jnp.float32))


@pytest.fixture(scope="module")
def loaded(directory: Path, tiny: TinyModel, programs: None) -> Iterator[LLM]:
    """Two sequences run at once, and share 16 tokens of a step."""
    llm = LLM(directory, max_num_seqs=2, max_num_batched_tokens=16, block_size=4, cache_memory=2**18)
    yield llm
    llm.engine.close()


@pytest.fixture
def llm(loaded: LLM) -> Iterator[LLM]:
    """Nothing is in its engine before and after."""
    check_idle(loaded.engine)
    yield loaded
    check_idle(loaded.engine)


def greedy(tiny: TinyModel, prompt: Sequence[int], count: int = 10, bias: dict[int, int] | None = None) -> list[int]:
    """The most likely tokens after a prompt, with one whole forward pass for each."""
    tokens = list(prompt)
    for _ in range(count):
        logits = tiny.logits(tokens)[-1]
        for token, added in (bias or {}).items():
            logits[token] += added
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


def text_of(tokens: Sequence[int]) -> str:
    """What the bytes among the tokens spell."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def ids_of(text: str) -> list[int]:
    """A prompt's tokens: its bytes, after the token that the tokenizer puts first."""
    return [BOS_ID, *text.encode()]


def assert_greedy(output: RequestOutput, tiny: TinyModel, prompt: Sequence[int], count: int = 10) -> None:
    """It is the one completion of this prompt, in tokens and as text."""
    expected = greedy(tiny, prompt, count)
    assert output.prompt_token_ids == list(prompt)
    (completion,) = output.outputs
    assert (completion.index, completion.token_ids, completion.text) == (0, expected, text_of(expected))
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert output.finished


# --- prompts --------------------------------------------------------------------------------------------------------


def test_a_string(llm: LLM, tiny: TinyModel) -> None:
    (output,) = llm.generate("grüß", GREEDY, use_tqdm=False)
    assert output.prompt == "grüß"
    assert_greedy(output, tiny, ids_of("grüß"))


def test_a_list_of_token_ids(llm: LLM, tiny: TinyModel) -> None:
    """It is taken as it is."""
    (output,) = llm.generate([7, 200, 9], GREEDY, use_tqdm=False)
    assert output.prompt is None
    assert_greedy(output, tiny, [7, 200, 9])


def test_strings_and_token_ids_together(llm: LLM, tiny: TinyModel) -> None:
    """More than run at once."""
    prompts = ["abc", [5, 6, 7], "a longer one, which takes several steps", [EOS_ID]]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["abc", None, prompts[2], None]
    for output, prompt in zip(outputs, prompts, strict=True):
        assert_greedy(output, tiny, ids_of(prompt) if isinstance(prompt, str) else prompt)


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM, tiny: TinyModel) -> None:
    """Whatever ends first."""
    lengths = [20, 1, 13, 2, 7, 1]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = llm.generate([[i] for i in range(6)], params, use_tqdm=False)
    for i, (output, length) in enumerate(zip(outputs, lengths, strict=True)):
        assert_greedy(output, tiny, [i], length)
    assert len({output.request_id for output in outputs}) == 6


def test_the_same_prefix_is_found_in_the_cache(llm: LLM, tiny: TinyModel) -> None:
    prompt = list(range(30, 43))
    first, second = (llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 12)
    assert_greedy(second, tiny, prompt)


# --- parameters -----------------------------------------------------------------------------------------------------


def test_params_that_are_not_given_are_the_checkpoints_own(llm: LLM, tiny: TinyModel) -> None:
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.max_tokens) == (0, 5)
    prompt = next([i] for i in range(256) if not {EOS_ID, END_ID} & {*greedy(tiny, [i], 5)})
    (output,) = llm.generate(prompt, use_tqdm=False)
    assert_greedy(output, tiny, prompt, 5)


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_params_as_prompts_or_one(llm: LLM, count: int) -> None:
    with pytest.raises(RequestError, match=f"2 prompts but {count} sampling params"):
        llm.generate(["a", "b"], [GREEDY] * count, use_tqdm=False)


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text(llm: LLM, tiny: TinyModel, as_list: bool, include: bool) -> None:
    tokens = greedy(tiny, ids_of("abc"), 20, ASCII)
    text = bytes(tokens).decode()
    stop = text[5:8]
    start = text.index(stop)
    params = SamplingParams(
        temperature=0,
        max_tokens=20,
        logit_bias=ASCII,
        stop=["never there", stop] if as_list else stop,
        include_stop_str_in_output=include,
        logprobs=0,
    )
    stopped, other = llm.generate(["abc", "xyz"], params, use_tqdm=False)
    (completion,) = stopped.outputs
    assert completion.text == text[: start + 3 if include else start]
    assert completion.token_ids == tokens[: start + 3]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert [scored.token_id for scored in completion.logprobs or ()] == tokens[: start + 3]
    assert other.finished


def test_end_and_stop_tokens_end_the_output_without_a_text(llm: LLM) -> None:
    ends = SamplingParams(temperature=0, logit_bias={END_ID: 100})
    stops = SamplingParams(temperature=0, logit_bias={ord("x"): 100}, stop_token_ids=[ord("x")])
    for output, token, reason in zip(
        llm.generate(["a", "a"], [ends, stops], use_tqdm=False), (END_ID, ord("x")), (None, ord("x")), strict=True
    ):
        (completion,) = output.outputs
        assert (completion.token_ids, completion.text) == ([token], "")
        assert (completion.finish_reason, completion.stop_reason) == ("stop", reason)


def test_several_completions(llm: LLM, tiny: TinyModel) -> None:
    """Greedy ones are alike; with a seed they differ, and are the same the next time."""
    alike = SamplingParams(n=3, temperature=0, max_tokens=10, ignore_eos=True)
    differ = SamplingParams(n=3, temperature=1, seed=5, max_tokens=10, ignore_eos=True)
    prompts = ["abc", "xyz"]
    first, second = llm.generate(prompts, [alike, differ], use_tqdm=False)
    assert [completion.token_ids for completion in first.outputs] == [greedy(tiny, ids_of("abc"))] * 3
    assert [completion.index for completion in second.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in second.outputs}) == 3
    assert [completion.text for completion in second.outputs] == [text_of(c.token_ids) for c in second.outputs]
    (again,) = llm.generate("xyz", differ, use_tqdm=False)
    assert again.outputs == second.outputs


def assert_scores(scored: TokenLogprobs | None, logprobs: np.ndarray, token: int, k: int) -> None:
    """They are those of the model's own distribution, `logprobs` [V]."""
    assert scored is not None
    best = np.argsort(-logprobs)[:k]
    assert (scored.token_id, scored.rank) == (token, 1 + (logprobs > logprobs[token]).sum())
    assert scored.logprob == pytest.approx(logprobs[token], abs=1e-4)
    assert [i for i, _ in scored.top] == best.tolist()
    assert [p for _, p in scored.top] == pytest.approx(logprobs[best], abs=1e-4)


def test_logprobs(llm: LLM, tiny: TinyModel) -> None:
    """Of sampled tokens and of the prompt's, which is longer than a step."""
    prompt = ids_of("a prompt that takes three steps")
    params = SamplingParams(seed=1, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    (completion,) = output.outputs
    tokens = prompt + completion.token_ids
    expected = log_softmax(tiny.logits(tokens))
    assert output.prompt_logprobs is not None
    assert completion.logprobs is not None
    assert output.prompt_logprobs[0] is None
    scores = [*output.prompt_logprobs[1:], *completion.logprobs]
    for position, scored in enumerate(scores, 1):
        k = 2 if position < len(prompt) else 3
        assert_scores(scored, expected[position - 1], tokens[position], k)


def test_logprobs_come_only_when_asked_for(llm: LLM) -> None:
    (output,) = llm.generate("abc", GREEDY, use_tqdm=False)
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None


# --- chat -----------------------------------------------------------------------------------------------------------


def test_chat(llm: LLM, tiny: TinyModel) -> None:
    """One conversation or several, written out by the template; no token is put before it a second time."""
    hello = [{"role": "user", "content": "hi"}]
    longer = [*hello, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "?"}]
    prompt = [BOS_ID, USER, *b"hi", END_ID, ASSISTANT]
    other = [BOS_ID, USER, *b"hi", END_ID, ASSISTANT, *b"ho", END_ID, USER, *b"?", END_ID, ASSISTANT]
    (one,) = llm.chat(hello, GREEDY, use_tqdm=False)
    assert_greedy(one, tiny, prompt)
    first, second = llm.chat([hello, longer], GREEDY, use_tqdm=False)
    assert_greedy(first, tiny, prompt)
    assert_greedy(second, tiny, other)
    (default,) = llm.chat(hello, use_tqdm=False)
    assert default.outputs[0].token_ids == greedy(tiny, prompt, 5)[: len(default.outputs[0].token_ids)]


def test_variables_reach_the_template(llm: LLM, tiny: TinyModel) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert_greedy(output, tiny, [BOS_ID, USER, *b"hi", END_ID])


def test_what_the_template_refuses(llm: LLM) -> None:
    with pytest.raises(TokenizerError, match="roles are system, user and assistant"):
        llm.chat([{"role": "tool", "content": "hi"}], GREEDY, use_tqdm=False)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [[], [VOCAB_SIZE], [1] * MAX_LEN, "x" * MAX_LEN],
    ids=["empty", "outside the vocabulary", "too long", "a string too long"],
)
def test_a_bad_prompt_among_good_ones_leaves_nothing_behind(llm: LLM, tiny: TinyModel, bad: Any) -> None:
    steps = llm.engine.stats().steps
    with pytest.raises(RequestError) as refused:
        llm.generate(["abc", [1, 2], bad, "xyz"], GREEDY, use_tqdm=False)
    assert refused.value.param == "prompt"
    assert not llm.engine.has_work
    assert llm.engine.stats().steps == steps
    assert_greedy(llm.generate("abc", GREEDY, use_tqdm=False)[0], tiny, ids_of("abc"))


def test_an_interrupt_leaves_nothing_behind(llm: LLM, tiny: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = llm.engine.step, iter(range(3))

    def interrupted() -> Any:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return step()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(llm.engine, "step", interrupted)
        llm.generate(["abc", "defg", "hi"], GREEDY, use_tqdm=False)
    stats = llm.engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert_greedy(llm.generate("abc", GREEDY, use_tqdm=False)[0], tiny, ids_of("abc"))


@pytest.mark.parametrize("show", [True, False])
def test_progress_is_shown_unless_it_is_unwanted(llm: LLM, capsys: pytest.CaptureFixture[str], show: bool) -> None:
    llm.generate(["abc", "xyz"], GREEDY, use_tqdm=show)
    shown = capsys.readouterr()
    assert ("2/2" in shown.out + shown.err) == show
    assert show or not shown.out + shown.err
