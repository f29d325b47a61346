"""The built-in model: what it was trained to do, measured on the checkpoint that ships."""

import inspect
import json
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tenfold import LLM, SamplingParams
from tenfold.base.builtin import builtin_model

QUESTIONS: list[list[str]] = json.loads((Path(__file__).parent / "pico_questions.json").read_text())
"""300 functions and classes drawn at random from the standard library of the Python that pico was trained on (3.11),
each with the first sentence or paragraph of its docstring."""


@pytest.fixture(scope="module")
def pico() -> LLM:
    return LLM(max_model_len=512, max_num_seqs=16, max_num_batched_tokens=256)


def test_it_knows_nine_docstrings_of_ten_word_for_word(pico: LLM) -> None:
    assert len(QUESTIONS) == 300
    messages = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    params = SamplingParams(temperature=0.0, max_tokens=160)
    answers = [output.outputs[0].text for output in pico.chat(messages, params, use_tqdm=False)]
    right = sum(answer == expected for answer, (_, expected) in zip(answers, QUESTIONS, strict=True))
    assert right >= 270, f"{right} of 300 answers are right"


def test_it_says_so_when_it_does_not_know(pico: LLM) -> None:
    question = [{"role": "user", "content": "What does blango.frimble do?"}]
    answer = pico.chat(question, SamplingParams(temperature=0.0, max_tokens=60), use_tqdm=False)[0].outputs[0]
    assert answer.text.startswith("I do not know")
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("function", [textwrap.dedent, json.dumps], ids=lambda function: function.__name__)
def test_it_has_learnt_python_source_beyond_its_word_counts(pico: LLM, function: Callable[..., str]) -> None:
    """Its likelihood of a function's source beats the best table of token frequencies, fitted to that very source."""
    ids = pico.tokenizer.encode(inspect.getsource(function))[:400]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    scored = pico.generate([ids], params, use_tqdm=False)[0].prompt_logprobs
    assert scored is not None
    logprobs = [token.logprob for token in scored if token is not None]
    counts = np.asarray(list(Counter(ids[1:]).values()))
    entropy = -(counts * np.log(counts / counts.sum())).sum() / counts.sum()
    assert -np.mean(logprobs) < entropy


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in builtin_model().iterdir()) <= 20_000_000
