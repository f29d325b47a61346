"""Adapters against PEFT, and preference losses against TRL, as they are now: `make parity`."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.models.family import resolve
from tenfold.nn import adapter_checkpoint, checkpoint
from tenfold.nn.lora import adapt
from tenfold.nn.packed import packed_attend
from tests.parity import dpo, lora
from tests.parity.lora_cases import ADAPTERS
from tests.parity.test_live import SEED, run_peer
from tests.parity.training_cases import CONFIG

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800)]


@pytest.fixture(autouse=True)
def mixed_dtypes() -> Iterator[None]:
    """optax multiplies floats with integer step counts, which the suite's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PEFT answers now, and the base and the adapters as PEFT saves them."""
    path = tmp_path_factory.mktemp("answers")
    run_peer("-m", "tests.parity.lora_reference", "--write", str(path), "--save", str(path), "--seed", str(SEED))
    return path


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_step_has_the_loss_that_peft_has(name: str, answers: Path, tmp_path: Path) -> None:
    lora.assert_losses_agree(answers / f"{name}.json", tmp_path)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_go_both_ways(name: str, answers: Path, tmp_path: Path) -> None:
    """PEFT's file is read, written again, and read by PEFT: logits agree with ours, adapted and merged."""
    model = resolve(CONFIG)
    tree, base = model.params(), answers / "base"
    prompt = np.random.default_rng(SEED).integers(0, model.config.V, 40).tolist()
    (base / "prompt.json").write_text(json.dumps(prompt))
    config, adapters = adapter_checkpoint.load(answers / name, tree)
    adapter_checkpoint.save(tmp_path / "again", tree, adapters, config, base=str(base))
    adapter_checkpoint.merge(base, tmp_path / "again", tmp_path / "merged", tree)
    weights = checkpoint.load(base, tree, jnp.float32)
    merged = checkpoint.load(tmp_path / "merged", tree, jnp.float32)

    def logits(params: object) -> jax.Array:
        attend = packed_attend(jnp.zeros((1, len(prompt)), jnp.int32))
        hidden, _ = model.forward(params, jnp.asarray(prompt), jnp.arange(len(prompt)), attend)
        return model.logits(params, hidden)

    theirs = []
    for directory in (answers / name, tmp_path / "again"):
        run_peer("-m", "tests.parity.lora_reference", "--score", str(base), str(directory))
        theirs.append(np.load(directory / "logits.npy"))
    np.testing.assert_array_equal(theirs[0], theirs[1])
    for ours in (adapt(weights, adapters, config), merged):
        np.testing.assert_allclose(logits(ours), theirs[0], rtol=0, atol=1e-4)


def test_preference_losses_are_those_of_trl(tmp_path: Path) -> None:
    run_peer("-m", "tests.parity.dpo_reference", "--write", str(tmp_path), "--seed", str(SEED))
    dpo.assert_losses_agree(tmp_path / "dpo.json", tmp_path)
