"""The families against transformers itself, on weights that no golden file has: `make parity`.

Needs `.venv-peers` (torch and transformers), which `make parity` sets up. A case for each building block is not slow:
`pytest -m "parity and not slow"` asks transformers about those alone.
"""

import json
import subprocess
from collections.abc import Iterable, Iterator
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
from tests.parity.cases import CASES

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-peers" / "bin" / "python"
SEED = 1000  # far from those of the golden files
BLOCKS = {  # what each stands for
    "llama": "grouped queries and a gated feed-forward",
    "gemma2": "windows, soft-caps, norms on both sides",
    "qwen3-sliding-yarn-biases": "norms of heads, biases, YaRN",
    "phi3-longrope-long-v4": "fused tensors, longrope",
    "gpt2": "learned positions, layer norms, a plain feed-forward",
    "gemma3n": "shared caches, inputs of layers",
    "qwen3_next": "Gated DeltaNet, a shared expert",
    "falcon_h1": "Mamba 2 beside attention",
    "nemotron_h-experts": "layers of one part each, plain experts",
    "deepseek_v3": "latents, groups of experts",
    "gpt_oss": "sinks, fused experts",
    "llama4": "chunks, experts weighed on their input",
}
TABLES = ("config_keys", "parameter_counts")
CASE = {case.name: case for case in CASES}
TEXT = [case.name for case in CASES if "text_config" not in case.config]  # we export no other modalities

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]


def params(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in BLOCKS else pytest.mark.slow) for name in names]


def chosen(request: pytest.FixtureRequest, fixture: str) -> list[str]:
    """The cases of all tests that will run and use the fixture."""
    users = [each for each in request.session.items if fixture in getattr(each, "fixturenames", ())]
    return sorted(
        {each.callspec.params["name"] for each in users if isinstance(each, pytest.Function) and "[" in each.name}
    )


def run_peer(*args: str) -> None:
    if not PEER.exists():
        pytest.fail(f"{PEER} does not exist: `make parity` installs torch and transformers there")
    done = subprocess.run([PEER, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{args}:\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers answers now, in the form of golden files."""
    path = tmp_path_factory.mktemp("answers")
    run_peer(
        *("-m", "tests.parity.reference", "--write", str(path), "--seed", str(SEED)),
        *("--only", *TABLES, *chosen(request, "answers")),
    )
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


@pytest.mark.parametrize("name", params(CASE))
def test_scores_agree(name: str, answers: Path, tmp_path: Path) -> None:
    wanted = golden.read(answers / f"{name}.json")
    golden.save_checkpoint(wanted, tmp_path)
    golden.assert_scores_agree(wanted, *load(tmp_path, wanted.max_len))


@pytest.mark.usefixtures("compilation_cache")
@pytest.mark.parametrize("name", params(CASE))
def test_engine_agrees(name: str, answers: Path, tmp_path: Path) -> None:
    wanted = golden.read(answers / f"{name}.json")
    golden.save_checkpoint(wanted, tmp_path)
    golden.assert_engine_agrees(wanted, tmp_path)


def test_configuration_keys_and_counts_are_those_of_the_golden_files(answers: Path) -> None:
    for name in TABLES:
        assert (answers / f"{name}.json").read_bytes() == (golden.DIRECTORY / f"{name}.json").read_bytes()


def draw_weights(model: Model) -> Any:
    """Random weights; norms and biases too, which initialisation makes ones and zeros."""
    weights = initialize(model.params(), jax.random.key(SEED), jnp.float32)
    return jax.tree.map(lambda w: w + jnp.sin(jnp.arange(w.size, dtype=w.dtype)).reshape(w.shape) / 10, weights)


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory per case that we exported, each with a prompt and what transformers says of it."""
    path, names = tmp_path_factory.mktemp("exported"), chosen(request, "exported")
    for case in map(CASE.__getitem__, names):
        model = resolve(case.config).with_max_len(case.max_len)
        checkpoint.export(path / case.name, model.params(), draw_weights(model), config=case.config, dtype=jnp.float32)
        prompt = np.random.default_rng(SEED).integers(0, model.config.V, 60).tolist()
        (path / case.name / "prompt.json").write_text(json.dumps(prompt))
    run_peer("-m", "tests.parity.score", *(str(path / name) for name in names))
    return path


@pytest.mark.parametrize("name", params(TEXT))
def test_transformers_loads_what_we_export(name: str, exported: Path) -> None:
    case = CASE[name]
    model = resolve(case.config).with_max_len(case.max_len)
    prompt = json.loads((exported / case.name / "prompt.json").read_text())
    [ours] = golden.score_packed(model, draw_weights(model), [prompt])
    theirs = np.load(exported / case.name / "logprobs.npy")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=golden.TOLERANCE)
