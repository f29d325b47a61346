"""The weights of published models, counted from their declarations: as many as transformers gives them."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from tenfold.models.family import resolve
from tenfold.nn.param import count, leaves
from tenfold.parallel.sharding import DEFAULT_RULES, partition_spec
from tests.parity.cases import CASES
from tests.parity.full_size import FULL_SIZE
from tests.parity.golden import DIRECTORY

COUNTS: dict[str, int] = json.loads((DIRECTORY / "parameter_counts.json").read_text())
ARCHITECTURES = {case.config["model_type"]: case.config["architectures"] for case in CASES}


@pytest.mark.parametrize("name", sorted(FULL_SIZE))
def test_parameter_count(name: str) -> None:
    model = resolve(FULL_SIZE[name] | {"architectures": ARCHITECTURES[FULL_SIZE[name]["model_type"]]})
    assert count(model.params()) == COUNTS[name]
    assert count(model.params(stacked=True)) == COUNTS[name]


def test_deepseek_v3_lies_evenly_on_a_mesh() -> None:
    """671 billion weights: in 8 bits on 32 devices, experts over 8 and matrices over 4, some 24 GB for each."""
    config = FULL_SIZE["DeepSeek-V3"] | {"architectures": ["DeepseekV3ForCausalLM"]}
    model = resolve(config)
    mesh = jax.sharding.AbstractMesh((8, 4), ("expert", "tensor"))
    total, each = 0, 0
    for _, p in leaves(model.params()):
        spec = partition_spec(p.axes, p.shape, DEFAULT_RULES, mesh)
        split = math.prod(mesh.shape[axis] for axis in spec if isinstance(axis, str))
        total += math.prod(p.shape)
        each += math.prod(p.shape) // split
    assert 670e9 < total < 672e9
    assert each < 1.15 * total / mesh.size
    assert sum(spec.page_bytes(1, jnp.bfloat16) for spec in model.cache_specs()) == 61 * 576 * 2
