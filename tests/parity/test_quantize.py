"""The checkpoints that we quantise, in transformers with compressed-tensors: `make parity`."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.data.packing import pack
from tenfold.models.family import resolve
from tenfold.nn import checkpoint
from tenfold.nn.quantization import Scheme
from tenfold.train.quantize import calibrate
from tests.parity import golden
from tests.parity.cases import CASES, Case
from tests.parity.test_live import SEED, draw_weights, run_peer

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]

SCHEMES = {"int4": Scheme(4, 16), "int8": Scheme(8, None)}  # the groups do not divide every weight's inputs
FAMILIES = [case for case in CASES if case.engine]


def name_of(case: Case, scheme: str) -> str:
    return f"{case.name}-{scheme}"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised checkpoint per family and scheme, each with a prompt and what transformers says of it."""
    path = tmp_path_factory.mktemp("quantised")
    rng = np.random.default_rng(SEED)
    for case in FAMILIES:
        model = resolve(case.config).with_max_len(case.max_len)
        weights = draw_weights(model)
        rows = pack([(rng.integers(0, model.config.V, 48).tolist(), [True] * 48) for _ in range(4)], 48)
        for scheme, how in SCHEMES.items():
            directory = path / name_of(case, scheme)
            found = calibrate(model, weights, rows, how)
            checkpoint.export(directory, model.params(), found, config=case.config, dtype=jnp.float32)
            (directory / "prompt.json").write_text(json.dumps(rng.integers(0, model.config.V, 60).tolist()))
    run_peer("-m", "tests.parity.score", *map(str, sorted(path.iterdir())))
    return path


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_transformers_reads_the_same_weights(case: Case, scheme: str, written: Path) -> None:
    directory = written / name_of(case, scheme)
    model = resolve(case.config).with_max_len(case.max_len)
    prompt = json.loads((directory / "prompt.json").read_text())
    [ours] = golden.score_packed(model, checkpoint.load(directory, model.params(), jnp.float32), [prompt])
    theirs = np.load(directory / "logprobs.npy")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=golden.TOLERANCE)
