"""With the native operations a request's log-probabilities are the same to the last bit, however it was served."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.engine.config import EngineConfig
from tenfold.engine.engine import Engine
from tenfold.engine.memory import blocks_of, cache_dtype, plan_cache
from tenfold.engine.outputs import TokenLogprobs
from tenfold.kernels import native
from tenfold.nn.packing import pack
from tenfold.nn.param import is_param
from tenfold.nn.quantization import SCHEMES, quantize_param
from tests.engine.conftest import check_idle
from tests.engine.oracle import EOS, MAX_LEN, tiny_model
from tests.engine.test_engine import Completion, Request, generate, requests, serve

pytestmark = [
    pytest.mark.usefixtures("optimised"),
    pytest.mark.skipif(native.library() is None, reason="the native kernels are not built"),
    # beartype picks at random which element of a tuple it checks, also in what strategies build
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
]

FORMATS: dict[
    str, tuple[str, str | None, str]
] = {  # what is computed in, how weights are rounded, what the cache is held in
    "float32": ("float32", None, "auto"),
    "bfloat16": ("bfloat16", None, "auto"),
    "int8": ("float32", "int8", "int8"),
    "fp8": ("bfloat16", None, "fp8"),
}
OTHERS = (
    *(("float32", "alternating"), ("bfloat16", "full"), ("int8", "alternating"), ("fp8", "full")),
    *(("fp8", "alternating"), ("bfloat16", "chunked"), ("float32", "sharing")),
)
PREEMPTING = 1.4  # longest sequences that the cache holds, of the four that may run


def make_engine(dtype: str, scheme: str | None, cache: str, model: str) -> Engine:
    tiny = tiny_model(model)

    def finish(p, weight: jax.Array):
        weight = weight.astype(dtype)
        return pack(p, weight if scheme is None else quantize_param(p, weight, SCHEMES[scheme]))

    params = jax.tree.map(finish, tiny.model.params(), tiny.params, is_leaf=is_param)
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=24, block_size=8, kv_cache_dtype=cache)
    cache_memory = sum(
        spec.page_bytes(8, cache_dtype(config, dtype)) * (1 + blocks_of(spec.reach, MAX_LEN, config) * PREEMPTING)
        for spec in tiny.model.cache_specs()
        if spec
    )
    config = replace(config, cache_memory=int(cache_memory))
    return Engine(tiny.model, params, config, plan_cache(tiny.model, config, jnp.dtype(dtype), 2**30, "cpu"), EOS)


def exact(scored: Sequence[TokenLogprobs | None] | None) -> list[tuple[object, ...] | None]:
    return [None if s is None else (s.token_id, s.logprob, s.rank, s.top) for s in scored or ()]


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(
    ("form", "model"),
    [
        ("float32", "full"),
        ("bfloat16", "alternating"),
        ("int8", "full"),
        *(pytest.param(form, model, marks=pytest.mark.slow) for form, model in OTHERS),
    ],
)
def test_logprobs_are_bit_identical_alone_and_in_any_company(form: str, model: str) -> None:
    """Alone or in a batch, in chunks or whole, on a prefix hit or a miss, before and after a preemption."""
    engine = make_engine(*FORMATS[form], model)
    served = 0

    @settings(max_examples=8)
    @given(st.lists(requests(), min_size=2, max_size=8))
    def workloads(asked: list[Request]) -> None:
        nonlocal served
        served += 1
        asked = [replace(r, params=replace(r.params, logprobs=3)) for r in asked]
        together = serve(engine, asked, f"workload {served}")
        check_idle(engine)
        for i, request in enumerate(asked):
            alone = generate(engine, request.prompt, request.params, cache_salt=f"alone {served} {i}")
            for index, whole in enumerate(alone):
                part = together.get((str(i), index), Completion())
                assert part.tokens == whole.tokens[: len(part.tokens)]
                assert exact(part.logprobs) == exact(whole.logprobs)[: len(part.logprobs)]
                if part.prompt_logprobs:
                    assert exact(part.prompt_logprobs) == exact(whole.prompt_logprobs)

    workloads()
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hits > 0
    engine.close()
