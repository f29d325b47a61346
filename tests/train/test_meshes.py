"""Training on any mesh of eight devices is training on one: the same losses, and no more bytes than the rules say."""

import dataclasses
import json
import math
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from tenfold.models.family import resolve
from tenfold.nn import param as params
from tenfold.parallel.collectives import collectives
from tenfold.parallel.mesh import parse_mesh
from tenfold.train.parallelism import Parallelism
from tests.train.cases import MODELS, Case

pytestmark = pytest.mark.slow

ONE_DEVICE = {model: Case(model, Parallelism(mesh="data=1")) for model in MODELS}
CHEAP = [
    Case("llama", Parallelism(mesh="pipeline=2,fsdp=2,tensor=2", micro_batches=4, schedule="1f1b")),
    Case("mixtral", Parallelism(mesh="fsdp=2,expert=2")),
]
ALONE = [
    Case("llama", Parallelism(mesh="data=8")),
    Case("llama", Parallelism(mesh="fsdp=8")),
    Case("llama", Parallelism(mesh="tensor=4", remat="offload")),
    Case("llama", Parallelism(mesh="context=8")),
    Case("llama", Parallelism(mesh="pipeline=4", micro_batches=8, schedule="1f1b")),
    Case("mixtral", Parallelism(mesh="expert=4")),
]
MIXED = [
    Case("llama", Parallelism(mesh="data=2,fsdp=4", micro_batches=2)),
    Case("llama", Parallelism(mesh="fsdp=4,tensor=2", remat="full")),
    Case("llama", Parallelism(mesh="data=2,fsdp=2,tensor=2")),
    Case("llama", Parallelism(mesh="data=2,context=4")),
    Case("llama", Parallelism(mesh="fsdp=2,context=2,tensor=2", micro_batches=2, remat="dots", unroll=True)),
    Case("llama", Parallelism(mesh="pipeline=2,data=4", micro_batches=4)),
    Case("llama", Parallelism(mesh="pipeline=2,fsdp=2,tensor=2", micro_batches=4, schedule="interleaved", stages=2)),
    Case("llama", Parallelism(mesh="pipeline=2,data=2,context=2", micro_batches=4, schedule="1f1b")),
    Case("llama", Parallelism(mesh="pipeline=4,tensor=2", micro_batches=4, remat="full")),
    Case("mixtral", Parallelism(mesh="data=2,expert=2,tensor=2")),
    Case("mixtral", Parallelism(mesh="pipeline=2,fsdp=2,expert=2", micro_batches=4, schedule="1f1b")),
]
EXPECTED = {
    "data": "all-reduce",  # of gradients
    "fsdp": "all-gather",  # of weights
    "tensor": "all-reduce",  # of activations
    "context": "collective-permute",  # of keys and values
    "pipeline": "collective-permute",  # of activations between stages
    "expert": "all-gather",  # of tokens
}
RULES = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "layers": "pipeline",
}


def run(*cases: Case) -> list[dict[str, Any]]:
    """Trains in a process with eight devices."""
    texts = [json.dumps([case.model, dataclasses.asdict(case.parallelism)]) for case in cases]
    done = subprocess.run([sys.executable, "-m", "tests.train.meshes", *texts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@cache
def cheap_results() -> dict[Case, dict[str, Any]]:
    """One process for all, with one device and with several: importing and starting jax takes as long as a case."""
    cases = [*ONE_DEVICE.values(), *CHEAP]
    return dict(zip(cases, run(*cases), strict=True))


def check(case: Case, result: dict[str, Any]) -> None:
    expected_losses = cheap_results()[ONE_DEVICE[case.model]]["losses"]
    assert result["losses"] == pytest.approx(expected_losses, abs=1e-5)
    assert result["losses"][-1] < result["losses"][0] - 0.5
    mesh, tree = parse_mesh(case.parallelism.mesh), resolve(MODELS[case.model]).params(stacked=True)
    expected, largest = 0, 0
    for _, p in params.leaves(tree):
        ways = [mesh.get(RULES.get(axis, ""), 1) for axis in p.axes.split()]
        held = [n // w if n % w == 0 else n for n, w in zip(p.shape, ways, strict=True)]
        expected += 4 * math.prod(held)
        largest = max(largest, 4 * math.prod(p.shape) // (p.shape[0] if p.stacked else 1))
    assert set(result["held"]) == {expected}
    found = collectives(result["hlo"], mesh)
    for axis in mesh:
        kind = "all-gather" if axis == "context" and "pipeline" in mesh else EXPECTED[axis]  # see ring_attention.Ring
        assert any(c.kind == kind and axis in c.axes for c in found), (axis, found)
    # The gradient of embeddings gathers a micro-batch's states instead: fewer bytes than the gradient has.
    of_weights = "\n".join(line for line in result["hlo"].splitlines() if "scatter-add" not in line)
    gathered = [c for c in collectives(of_weights, mesh) if c.kind == "all-gather" and c.axes == ("fsdp",)]
    assert all(c.nbytes <= largest for c in gathered), "something larger than one layer's weight is gathered"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CHEAP, ids=str)
def test_losses_are_those_of_one_device(case: Case) -> None:
    check(case, cheap_results()[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [*ALONE, *MIXED], ids=str)
def test_losses_are_those_of_one_device_on_every_mesh(case: Case) -> None:
    [result] = run(case)
    check(case, result)
