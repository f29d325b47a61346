"""What the survey says of architectures, against the models that are compared with transformers."""

from functools import cache

import pytest

from tenfold.models import FAMILIES
from tenfold.models.capabilities import CACHES, caches, describe
from tenfold.models.family import resolve
from tenfold.nn.param import leaves
from tests.parity.cases import CASES

known = cache(describe)


@pytest.mark.parametrize("architecture", sorted({case.config["architectures"][0] for case in CASES}))
def test_whatever_is_held_to_transformers_is_known(architecture: str) -> None:
    """The small configurations ask for everything that those of the cases ask for."""
    models = [resolve(case.config) for case in CASES if case.config["architectures"] == [architecture]]
    assert set().union(*map(caches, models)) <= set(known(architecture).caches)
    assert any(p.routes for model in models for _, p in leaves(model.params())) <= known(architecture).experts


def test_every_kind_of_cache_has_an_architecture() -> None:
    assert {kind for architecture in FAMILIES for kind in known(architecture).caches} == set(CACHES)


def test_what_sets_architectures_apart() -> None:
    assert known("LlamaForCausalLM").caches == ("full",)
    assert known("Gemma3nForCausalLM").caches == ("full", "window", "shared")
    assert known("NemotronHForCausalLM").caches == ("full", "recurrent")
    assert known("DeepseekV3ForCausalLM").axes == ("expert", "fsdp", "tensor")
    assert not known("Qwen3_5ForCausalLM").experts
    assert known("Qwen3_5MoeForCausalLM").experts
