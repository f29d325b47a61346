"""What caches of published models take, by the engine's own plan."""

import pytest

from tenfold.engine.config import EngineConfig
from tenfold.engine.memory import CachePlan, plan_cache
from tenfold.models.family import Model, resolve
from tests.parity.cases import CASES
from tests.parity.full_size import FULL_SIZE

ARCHITECTURES = {case.config["model_type"]: case.config["architectures"] for case in CASES}
FREE = 2**42  # bytes: room for any of them


def full_size(name: str) -> Model:
    return resolve(FULL_SIZE[name] | {"architectures": ARCHITECTURES[FULL_SIZE[name]["model_type"]]})


def plan(model: Model, length: int) -> CachePlan:
    """For one sequence of that length at a time, in bfloat16."""
    return plan_cache(model, EngineConfig(max_num_seqs=1, max_model_len=length), "bfloat16", FREE, "gpu")


def test_a_latent_of_512_and_a_key_of_64_is_all_that_deepseek_holds_of_a_token() -> None:
    model, length = full_size("DeepSeek-V3"), 131072
    values = plan(model, length).num_bytes / 2
    assert values / length / model.config.L == pytest.approx(512 + 64, rel=0.05)


@pytest.mark.parametrize("name", ["gpt-oss-120b", "Llama-4-Maverick-17B-128E (text)"])
def test_windows_and_chunks_do_not_grow_with_the_sequence(name: str) -> None:
    """But for what is seen, they hold the tokens of one step."""
    model = full_size(name)
    short, long = (plan(model, length) for length in (32768, 131072))
    for before, after in zip(short.groups, long.groups, strict=True):
        if before.reach.most is None:
            assert after.num_pages - 1 == 4 * (before.num_pages - 1)
        else:
            assert after.num_pages == before.num_pages
            assert 32 * (after.num_pages - 1) <= before.reach.most + 512 + 32
    assert {group.reach.limited for group in long.groups} == {True, False}
