"""What lm-eval would be told, against the model run on whole texts; and lm-eval itself where it is installed."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold import LLM
from tenfold.base.errors import ConfigError
from tenfold.engine.harness import Answers, harness_model
from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tenfold.nn.packed import packed_attend
from tenfold.testing.byte_tokenizer import BOS_ID
from tenfold.testing.tiny import write_tiny_checkpoint

pytestmark = pytest.mark.slow

LONGEST = 48


class Request(NamedTuple):
    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(path, layers=1, width=32, max_len=LONGEST)
    return path


@pytest.fixture(scope="module")
def answers(path: Path) -> Answers:
    return Answers(LLM(path, max_num_seqs=2, max_num_batched_tokens=LONGEST, cache_memory=2**22))


def logprobs(path: Path, ids: list[int]) -> np.ndarray:
    """Log-probabilities [T, V] of what follows each token, without the engine; padded, so that one program does it."""
    model = resolve(checkpoint.read_config(path))
    params = checkpoint.load(path, model.params(), jnp.float32)
    padded = jnp.asarray([*ids, *[0] * (LONGEST - len(ids))])
    hidden, _ = model.forward(params, padded, jnp.arange(LONGEST), packed_attend(jnp.ones((1, LONGEST), int)))
    return np.asarray(jax.nn.log_softmax(model.logits(params, hidden)))[: len(ids)]


def test_likelihoods_of_continuations(path: Path, answers: Answers) -> None:
    pairs = [("The answer is", " no"), ("The answer is ", "yes"), ("", "abc")]
    found = answers.loglikelihood([Request(pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (score, greedy) in zip(pairs, found, strict=True):
        ids = [BOS_ID, *(context + continuation).encode()]
        last = len(continuation) if continuation != "yes" else 4  # the context's last space belongs to it
        rows = logprobs(path, ids)[:-1][-last:]
        wanted = ids[-last:]
        assert score == pytest.approx(float(rows[np.arange(last), wanted].sum()), abs=1e-3)
        assert greedy == bool((rows.argmax(-1) == wanted).all())


def test_a_greedy_continuation_is_known_as_one(answers: Answers) -> None:
    settings = {"until": [], "max_gen_toks": 1}
    ids = answers.llm.tokenizer.encode("Once upon a time")
    (output,) = answers.llm.generate([ids], answers_params(settings), use_tqdm=False)
    ((_, greedy),) = answers._score([(ids, list(output.outputs[0].token_ids))], show=False)
    assert greedy


def answers_params(settings: dict[str, Any]) -> Any:
    from tenfold.engine.harness import _sampling

    return _sampling(settings)


def test_a_long_text_is_scored_token_by_token_once(path: Path, answers: Answers) -> None:
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    (score,) = answers.loglikelihood_rolling([Request((text,))], disable_tqdm=True)
    windows = answers._windows(text)
    assert [token for _, scored in windows for token in scored] == list(text.encode())
    assert all(len(context) + len(scored) == LONGEST - 1 for context, scored in windows)
    wanted = 0.0
    for context, scored in windows:
        rows = logprobs(path, [*context, *scored])[:-1][-len(scored) :]
        wanted += float(rows[np.arange(len(scored)), scored].sum())
    assert score == pytest.approx(wanted, abs=1e-2)


def test_generation_ends_at_a_stop_string(answers: Answers) -> None:
    (whole,) = answers.generate_until([Request(("abc", {"until": [], "max_gen_toks": 12}))], disable_tqdm=True)
    assert len(whole) >= 4
    stop = whole[len(whole) // 2 :][:2]
    (cut,) = answers.generate_until([Request(("abc", {"until": stop, "max_gen_toks": 12}))], disable_tqdm=True)
    assert cut == whole[: whole.index(stop)]
    with pytest.raises(ConfigError, match="asks for 256 tokens; the model has 48"):
        answers.generate_until([Request(("abc", {}))], disable_tqdm=True)


def test_without_lm_eval_it_says_what_to_install(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ConfigError, match="pip install lm-eval"):
        harness_model(answers.llm)
