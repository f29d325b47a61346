"""The families against transformers itself, on weights that no golden file has: `make parity`.

Needs `.venv-peers` (torch and transformers), which `make parity` sets up.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.models.family import Model, resolve
from tenfold.nn import checkpoint
from tenfold.nn.param import initialize
from tests.parity import golden
from tests.parity.cases import CASES, Case

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"
SEED = 1000  # far from those of the golden files
NAMES = [case.name for case in CASES]
TEXT = [case for case in CASES if "text_config" not in case.config]  # we export no other modalities

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]


def run_peer(*args: str) -> None:
    if not PEER.exists():
        pytest.fail(f"{PEER} does not exist: `make parity` installs torch and transformers there")
    done = subprocess.run([PEER, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{args}:\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers answers now, in the form of golden files."""
    path = tmp_path_factory.mktemp("answers")
    run_peer("-m", "tests.parity.reference", "--write", str(path), "--seed", str(SEED))
    return path


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that several models share are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENFOLD_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def load(path: Path, max_len: int) -> tuple[Model, Any]:
    model = resolve(checkpoint.read_config(path)).with_max_len(max_len)
    return model, checkpoint.load(path, model.params(), jnp.float32, skipped=model.skipped())


@pytest.mark.parametrize("name", NAMES)
def test_scores_agree(name: str, answers: Path, tmp_path: Path) -> None:
    wanted = golden.read(answers / f"{name}.json")
    golden.save_checkpoint(wanted, tmp_path)
    golden.assert_scores_agree(wanted, *load(tmp_path, wanted.max_len))


@pytest.mark.usefixtures("compilation_cache")
@pytest.mark.parametrize("name", NAMES)
def test_engine_agrees(name: str, answers: Path, tmp_path: Path) -> None:
    wanted = golden.read(answers / f"{name}.json")
    golden.save_checkpoint(wanted, tmp_path)
    golden.assert_engine_agrees(wanted, tmp_path)


def test_configuration_keys_and_counts_are_those_of_the_golden_files(answers: Path) -> None:
    for file in ("config_keys.json", "parameter_counts.json"):
        assert (answers / file).read_bytes() == (golden.DIRECTORY / file).read_bytes()


def draw_weights(model: Model) -> Any:
    """Random weights; norms and biases too, which initialisation makes ones and zeros."""
    weights = initialize(model.params(), jax.random.key(SEED), jnp.float32)
    return jax.tree.map(lambda w: w + jnp.sin(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape) / 10, weights)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory per case that we exported, each with a prompt and what transformers says of it."""
    path = tmp_path_factory.mktemp("exported")
    for case in TEXT:
        model = resolve(case.config).with_max_len(case.max_len)
        checkpoint.export(path / case.name, model.params(), draw_weights(model), config=case.config, dtype=jnp.float32)
        prompt = np.random.default_rng(SEED).integers(0, model.config.V, 60).tolist()
        (path / case.name / "prompt.json").write_text(json.dumps(prompt))
    run_peer("-m", "tests.parity.score", *(str(path / case.name) for case in TEXT))
    return path


@pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)
def test_transformers_loads_what_we_export(case: Case, exported: Path) -> None:
    model = resolve(case.config).with_max_len(case.max_len)
    prompt = json.loads((exported / case.name / "prompt.json").read_text())
    [ours] = golden.score_packed(model, draw_weights(model), [prompt])
    theirs = np.load(exported / case.name / "logprobs.npy")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=golden.TOLERANCE)
