"""The weights of published models, counted from their declarations: as many as transformers gives them."""

import json
import math

import pytest
from jax.sharding import AbstractMesh

from tenfold.models.family import Model, resolve
from tenfold.nn.param import count, device_nbytes, nbytes
from tests.parity.cases import CASES
from tests.parity.full_size import FULL_SIZE
from tests.parity.golden import DIRECTORY

COUNTS: dict[str, int] = json.loads((DIRECTORY / "parameter_counts.json").read_text())
ARCHITECTURES = {case.config["model_type"]: case.config["architectures"] for case in CASES}


def full_size(name: str) -> Model:
    return resolve(FULL_SIZE[name] | {"architectures": ARCHITECTURES[FULL_SIZE[name]["model_type"]]})


@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_parameter_count(name: str) -> None:
    model = full_size(name)
    assert count(model.params()) == COUNTS[name]
    assert count(model.params(stacked=True)) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("Mixtral-8x7B-v0.1", 46.7),
        ("Llama-3.1-405B", 405.9),
        ("Llama-4-Maverick-17B-128E (text)", 400.7),
        ("gpt-oss-120b", 116.8),
        ("Qwen3-235B-A22B", 235.1),
        ("OLMoE-1B-7B-0924", 6.9),
        ("DeepSeek-V3", 671.0),
        ("Qwen3-Next-80B-A3B", 79.7),
    ],
)
def test_counts_are_those_that_were_published(name: str, billions: float) -> None:
    assert round(COUNTS[name] / 1e9, 1) == billions


@pytest.mark.parametrize(
    ("name", "mesh", "of_experts", "gigabytes"),
    [
        ("Llama-3.1-405B", {"fsdp": 4, "tensor": 8}, 0, 25.4),
        ("Mixtral-8x7B-v0.1", {"expert": 8, "tensor": 4}, 32 * 8 * 3 * 4096 * 14336, 3.6),
        ("DeepSeek-V3", {"expert": 8, "tensor": 4}, 58 * 256 * 3 * 7168 * 2048, 50.8),
        ("Llama-4-Maverick-17B-128E (text)", {"expert": 8, "tensor": 4}, 24 * 128 * 3 * 5120 * 8192, 31.2),
        ("gpt-oss-120b", {"expert": 8, "tensor": 4}, 36 * 128 * 3 * 2880 * 2880, 8.2),
    ],
)
def test_what_a_device_of_32_holds(name: str, mesh: dict[str, int], of_experts: int, gigabytes: float) -> None:
    """In bfloat16: a 32nd of the experts' weights, and of all others a share along the axes that are not experts'.

    Norms, routers, latents and a few heads, which are whole everywhere, make the difference.
    """
    tree = full_size(name).params()
    each = device_nbytes(tree, "bfloat16", AbstractMesh(tuple(mesh.values()), tuple(mesh)))
    shares = math.prod(size for axis, size in mesh.items() if axis != "expert")
    assert each == pytest.approx(2 * (of_experts / 32 + (COUNTS[name] - of_experts) / shares), rel=0.03)
    assert round(each / 1e9, 1) == gigabytes


@pytest.mark.parametrize("name", ["Mixtral-8x7B-v0.1", "gpt-oss-120b", "Qwen3-235B-A22B", "DeepSeek-V3"])
def test_experts_are_spread_over_devices(name: str) -> None:
    """Over experts alone, each of eight devices holds little over an eighth."""
    tree = full_size(name).params()
    whole = nbytes(tree, "bfloat16")
    assert device_nbytes(tree, "bfloat16", AbstractMesh((1,), ("expert",))) == whole
    each = device_nbytes(tree, "bfloat16", AbstractMesh((8,), ("expert",)))
    assert whole / 8 < each < whole / 8 * 1.35
