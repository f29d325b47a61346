"""What holding the cache in 8 bits costs the built-in model, natively and on XLA alone."""

import functools
import math
from collections.abc import Iterator

import numpy as np
import pytest

from tenfold import LLM, SamplingParams
from tenfold.base.builtin import builtin_model
from tenfold.data.tokenizer import Tokenizer
from tenfold.kernels import native
from tenfold.kernels.paged_attention import NativeCache, PagedCache
from tenfold.train.calibration import draw_rows, standard_library

TOKENS, PROMPTS = 512, 3


@functools.cache
def prompts() -> list[list[int]]:
    """Sources of the standard library, which the model has not seen: what it knows by heart would tell nothing."""
    return draw_rows(standard_library(), Tokenizer.load(builtin_model()), TOKENS, PROMPTS, 1).tokens.tolist()


def perplexity(cache: str, kind: type) -> float:
    """Of the prompts, as the engine computes them: in chunks, which read what earlier ones wrote."""
    llm = LLM(
        kv_cache_dtype=cache, dtype="float32", max_num_seqs=1, max_num_batched_tokens=64, max_model_len=TOKENS + 1
    )
    try:
        assert all(isinstance(held, kind) for held in llm.engine._runner._caches)
        wanted = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        outputs = llm.generate(prompts(), wanted, use_tqdm=False)
    finally:
        llm.engine.close()
    scored = [token.logprob for output in outputs for token in output.prompt_logprobs or () if token is not None]
    assert len(scored) == PROMPTS * (TOKENS - 1)
    return math.exp(-float(np.mean(scored)))


@pytest.fixture(scope="module")
def plain(programs: None) -> Iterator[float]:
    yield perplexity("auto", NativeCache if native.library() else PagedCache)


@pytest.mark.parametrize("cache", [pytest.param("int8", marks=pytest.mark.slow), "fp8"])
@pytest.mark.parametrize(
    "natively", [pytest.param(True, id="native"), pytest.param(False, id="XLA", marks=pytest.mark.slow)]
)
def test_perplexity_stays(cache: str, natively: bool, plain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if natively and native.library() is None:
        pytest.skip("the native kernels are not built")
    if not natively:
        monkeypatch.setattr(native, "available", lambda device: False)
    held = perplexity(cache, NativeCache if natively else PagedCache)
    assert abs(held / plain - 1) < 0.01
