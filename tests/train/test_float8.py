"""Training with products in 8-bit floats: which they are, and how near what comes of it is to wider floats'."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tenfold.base.errors import ConfigError
from tenfold.data.packing import Rows
from tenfold.kernels.matmul import Float8Weight
from tenfold.models.family import resolve
from tenfold.nn import lora, param
from tenfold.nn.float8 import in_float8
from tenfold.nn.lora import LoraConfig
from tenfold.nn.stack import Placement
from tenfold.train.adapters import Frozen, TuningConfig, adapted_loss, start
from tenfold.train.batches import place
from tenfold.train.distill import distillation_loss
from tenfold.train.dpo import Pairs, dpo_loss
from tenfold.train.embed import Texts, contrastive_loss
from tenfold.train.loss import Loss, full_training, staged_full_training
from tenfold.train.parallelism import Parallelism
from tenfold.train.state import init_state
from tenfold.train.step import accumulate, make_step
from tenfold.train.trainer import TrainConfig, train
from tests.train import runs
from tests.train.cases import LLAMA, MODELS, VOCAB

pytestmark = pytest.mark.usefixtures("mixed_dtypes")

FP8 = Placement(fp8=True)
SMALL = LLAMA | {"num_hidden_layers": 2}


def make_rows(seed: int = 0, rows: int = 8, length: int = 16) -> Rows:
    """Tokens that count, from somewhere: what a model learns in a few steps."""
    at = np.arange(length, dtype=np.int32)
    first = np.random.default_rng(seed).integers(0, VOCAB, (rows, 1), dtype=np.int32)
    tokens = (first + at[None]) % VOCAB
    positions = np.broadcast_to(at, tokens.shape)
    return Rows(tokens, np.ones_like(tokens), positions, np.ones(tokens.shape, np.float32))


def draw(declared: Any, scale: float = 0.1) -> Any:
    rng = np.random.default_rng(0)
    return param.map_params(
        lambda p: jnp.asarray((rng.normal(0, scale, p.shape) if p.init == "normal" else np.ones(p.shape)), jnp.float32),
        declared,
    )


def in_8_bits(architecture: str) -> set[str]:
    declared = resolve(MODELS[architecture]).params(stacked=True)
    tree = in_float8(param.abstract(declared, np.float32), declared)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Float8Weight))
    return {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in leaves
        if isinstance(leaf, Float8Weight)
    }


def test_linear_layers_are_in_8_bits_and_embeddings_norms_routers_and_experts_are_not() -> None:
    attention = {"layers.scan.0.q", "layers.scan.0.k", "layers.scan.0.v", "layers.scan.0.o"}
    mlp = {"layers.scan.0.gate", "layers.scan.0.up", "layers.scan.0.down"}
    assert in_8_bits("llama") == attention | mlp
    assert in_8_bits("mixtral") == attention


def test_gradients_are_off_by_what_the_formats_round() -> None:
    """A number is off by at most 2^-4 of itself in e4m3 and 2^-3 in e5m2, so a product of two in e4m3 by 2^-4.7 in the
    mean of squares (2^-4 · √(2/3) · 3/4, for numbers that are spread evenly in a power of two), and with one in e5m2
    by 2^-4.1. Through 2 layers, forwards and back, at most 16 follow each other, and their errors are independent."""
    model = resolve(SMALL)
    weights, rows = draw(model.params(stacked=True)), make_rows()
    exact, rounded = (
        jax.jit(accumulate(full_training(model, placement)))(weights, {}, rows) for placement in (Placement(), FP8)
    )
    assert abs(float(exact[0].mean - rounded[0].mean)) < 2.0**-4
    for path, g in jax.tree_util.tree_leaves_with_path(exact[1]):
        other = functools.reduce(
            lambda tree, key: tree[getattr(key, "key", getattr(key, "idx", None))], path, rounded[1]
        )
        off = float(jnp.linalg.norm(g - other) / jnp.linalg.norm(g))
        assert 1e-4 < off < 2.0**-4 * 4, (path, off)


def losses(steps: int, placement: Placement, dtype: str, parallelism: Parallelism | None = None) -> list[float]:
    """Of a run from the same weights."""
    model = resolve(SMALL)
    declared, layout = model.params(stacked=True), placement.layout
    shardings = None if layout.mesh is None else param.shardings(declared, layout.mesh)  # pyright: ignore[reportArgumentType]
    weights = draw(declared) if shardings is None else jax.device_put(draw(declared), shardings)
    grad = (parallelism or Parallelism()).make_grad(staged_full_training(model), placement, shardings)
    optimizer = optax.adamw(5e-3)
    step = jax.jit(make_step(grad, optimizer, compute_dtype=jnp.dtype(dtype)), donate_argnums=0)
    state, found = init_state(optimizer, weights, shardings), []
    for i in range(steps):
        state, metrics = step(state, {}, place(make_rows(i), layout))
        found.append(float(metrics["loss"]))
    return found


@pytest.mark.slow
def test_a_model_learns_as_in_bfloat16() -> None:
    wide, narrow = (losses(60, Placement(fp8=fp8), "bfloat16") for fp8 in (False, True))
    assert wide[0] > 3.5 and wide[-1] < 0.5 * wide[0]
    assert wide != narrow
    assert abs(np.mean(narrow[-5:]) - np.mean(wide[-5:])) < 0.1


@pytest.mark.parametrize(
    "parallelism",
    [
        Parallelism(mesh="fsdp=2,tensor=2", remat="dots"),
        pytest.param(Parallelism(mesh="fsdp=2,tensor=2", remat="full", unroll=True), marks=pytest.mark.slow),
        pytest.param(Parallelism(mesh="context=2,data=2"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_are_those_of_one_device(parallelism: Parallelism) -> None:
    """Scales are of whole arrays, wherever their parts lie."""
    spread = losses(3, parallelism.make_placement(fp8=True), "float32", parallelism)
    np.testing.assert_allclose(spread, alone(1), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_pipeline_does_what_one_device_does_part_by_part() -> None:
    parallelism = Parallelism(mesh="pipeline=2,fsdp=2", micro_batches=2)
    spread = losses(3, parallelism.make_placement(fp8=True), "float32", parallelism)
    np.testing.assert_allclose(spread, alone(2), rtol=0, atol=1e-5)


@functools.cache
def alone(micro_batches: int) -> list[float]:
    return losses(3, FP8, "float32", Parallelism(micro_batches=micro_batches))


def test_adapters_lie_over_a_base_in_8_bits() -> None:
    model = resolve(SMALL)
    declared, rows = model.params(stacked=True), make_rows()
    base = draw(declared)
    for config in (LoraConfig(r=2), LoraConfig(r=2, use_dora=True)):
        adapters = lora.initialize(lora.adapter_params(declared, config), base, jax.random.key(0))
        loss = adapted_loss(full_training(model, FP8), config)
        sums, gradients = jax.jit(accumulate(loss))(adapters, Frozen(base, {}), rows)
        of_base = jax.jit(full_training(model, FP8))(base, {}, rows)
        np.testing.assert_allclose(sums.total, of_base.total, rtol=1e-3 if config.use_dora else 1e-6)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))
        assert any(jnp.any(g != 0) for g in jax.tree.leaves(gradients))


def test_every_recipe_trains_in_8_bits() -> None:
    model = resolve(LLAMA | {"num_hidden_layers": 1})
    weights, rows = param.abstract(model.params(stacked=True), np.float32), make_rows()
    passages = Rows(*(x[:, None] for x in rows))
    recipes: list[tuple[Loss, Any, Any]] = [
        (full_training(model, FP8), {}, rows),
        (dpo_loss(model, placement=FP8), {}, Pairs(rows, rows, np.zeros((8, 2), np.float32))),
        (distillation_loss(model, model, placement=FP8), {"teacher": weights}, rows),
        (contrastive_loss(model, placement=FP8), {}, Texts(rows, passages)),
    ]
    for loss, frozen, batch in recipes:
        text = str(jax.make_jaxpr(accumulate(loss))(weights, frozen, batch))
        assert "f8_e4m3fn" in text and "f8_e5m2" in text


def test_weights_in_few_bits_are_refused() -> None:
    training = TrainConfig(steps=1, fp8=True)
    with pytest.raises(ConfigError, match="leave fp8 out, or take the plain checkpoint without quantization"):
        start(TuningConfig(lora=LoraConfig(), quantization="int8", training=training))


def test_a_run_says_that_this_device_gains_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(runs.make_job(), runs.make_config(6, fp8=True), runs.make_batches(), tmp_path)
    assert "cpu has no units for 8-bit floats: fp8 rounds as there, but saves no time" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["fp8"] is True
