"""Learning rates and optimizers against their formulas in numpy; AdamW is compared with torch in `test_parity`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.base.errors import ConfigError
from tenfold.nn.param import Param, param, stack
from tenfold.train.optimizers import OptimizerConfig, decays_weight, learning_rate, make_optimizer

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


def rates(steps: int, at: list[int], **config: object) -> list[float]:
    rate = learning_rate(OptimizerConfig(learning_rate=0.5, **config), steps)  # type: ignore[arg-type]
    on_device = [float(rate(jnp.asarray(step))) for step in at]
    assert on_device == pytest.approx([float(rate(step)) for step in at], abs=1e-7)
    return on_device


def test_every_schedule_warms_up_and_ends_where_it_should() -> None:
    at = [0, 5, 10, 55, 100, 120]
    common = {"warmup_steps": 10}
    assert rates(100, at, schedule="constant", **common) == pytest.approx([0, 0.25, 0.5, 0.5, 0.5, 0.5])
    assert rates(100, at, schedule="linear", **common) == pytest.approx([0, 0.25, 0.5, 0.25, 0, 0])
    cosine = [0, 0.25, 0.5, 0.25, 0, 0]
    assert rates(100, at, schedule="cosine", **common) == pytest.approx(cosine, abs=1e-7)
    assert rates(100, [32], schedule="cosine", **common) == pytest.approx([0.25 * (1 + np.cos(np.pi * 22 / 90))])
    wsd = {"schedule": "wsd", "decay_steps": 30, **common}
    assert rates(100, [0, 5, 10, 69, 70, 85, 100], **wsd) == pytest.approx([0, 0.25, 0.5, 0.5, 0.5, 0.25, 0])
    assert rates(100, [100, 55], schedule="linear", min_lr_ratio=0.1, **common) == pytest.approx([0.05, 0.275])
    assert rates(100, [0], schedule="constant") == [0.5]  # no warm-up


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "one of adamw, adafactor, muon; it is 'sgd'"),
        ({"schedule": "exponential"}, "one of constant, linear, cosine, wsd"),
        ({"schedule": "wsd"}, "wsd needs decay_steps"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"min_lr_ratio": 2.0}, "from 0 to 1"),
        ({"max_grad_norm": 0.0}, "None to clip nothing"),
    ],
)
def test_options_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**changes)  # type: ignore[arg-type]


def test_a_schedule_must_fit_its_run() -> None:
    config = OptimizerConfig(schedule="wsd", warmup_steps=5, decay_steps=6)
    with pytest.raises(ConfigError, match="5 warmup_steps and 6 decay_steps do not fit into 10 steps"):
        learning_rate(config, 10)


def declared() -> dict[str, Param]:
    """Two stacked layers of a product with heads, a stacked norm, a bias of heads, and an embedding."""
    layers = ("0", "1")
    q = [param((6, 2, 2), "embed heads head_dim", f"{i}.q", "(H K) D -> D H K", inputs="embed") for i in layers]
    o = [
        param((2, 2, 6), "heads head_dim embed", f"{i}.o", "D (H K) -> H K D", inputs="heads head_dim") for i in layers
    ]
    return {
        "q": stack(q),
        "o": stack(o),
        "norm": stack([param((6,), "embed", f"{i}.norm") for i in layers]),
        "bias": param((2, 2), "heads head_dim", "bias", "(H K) -> H K"),
        "embed": param((7, 6), "vocab embed", "embed"),
    }


def draw(seed: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for name, p in declared().items()}


def test_norms_and_biases_do_not_decay_whatever_their_dims_are_here() -> None:
    assert {name: decays_weight(p) for name, p in declared().items()} == {
        "q": True, "o": True, "norm": False, "bias": False, "embed": True
    }  # fmt: skip
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5)
    optimizer = make_optimizer(config, 10, declared())
    weights = draw(0)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = jax.jit(optimizer.update)(zeros, jax.jit(optimizer.init)(weights), weights)
    for name, p in declared().items():
        wanted = -0.1 * 0.5 * np.asarray(weights[name]) if decays_weight(p) else np.zeros(p.shape)
        np.testing.assert_allclose(updates[name], wanted, atol=1e-7)


def newton_schulz(x: np.ndarray) -> np.ndarray:
    """Five steps of the quintic iteration of Jordan (2024) on a matrix, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.astype(np.float64)
    flipped = x.shape[0] > x.shape[1]
    x = x.T if flipped else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if flipped else x


def test_muon_makes_each_layer_s_matrix_orthogonal() -> None:
    config = OptimizerConfig(optimizer="muon", learning_rate=0.1, schedule="constant", weight_decay=0.5, momentum=0.9)
    optimizer = make_optimizer(config, 10, declared())
    weights, gradients = draw(0), draw(1)
    updates, _ = jax.jit(optimizer.update)(gradients, jax.jit(optimizer.init)(weights), weights)
    for name, matrix in (("q", (6, 4)), ("o", (4, 6))):
        for layer in range(2):
            g = np.asarray(gradients[name][layer]).reshape(
                matrix
            )  # Nesterov's momentum of a first gradient is along it
            scale = 0.2 * np.sqrt(max(matrix))
            wanted = -0.1 * (scale * newton_schulz(g) + 0.5 * np.asarray(weights[name][layer]).reshape(matrix))
            np.testing.assert_allclose(np.asarray(updates[name][layer]).reshape(matrix), wanted, rtol=2e-3, atol=1e-4)
    g = np.asarray(gradients["embed"])  # Adam's first step, with Nesterov: along the sign
    np.testing.assert_allclose(np.sign(updates["embed"]), -np.sign(g))


def test_adafactor_has_its_rows_and_columns() -> None:
    config = OptimizerConfig(optimizer="adafactor", learning_rate=0.1, schedule="constant", weight_decay=0.5)
    big = {"w": param((256, 130), "embed mlp", "w", inputs="embed")}
    optimizer = make_optimizer(config, 10, big)
    rng = np.random.default_rng(0)
    w, g = (rng.normal(size=(256, 130)).astype(np.float32) for _ in range(2))
    updates, _ = jax.jit(optimizer.update)(
        {"w": jnp.asarray(g)}, jax.jit(optimizer.init)({"w": jnp.asarray(w)}), {"w": jnp.asarray(w)}
    )
    squares = g.astype(np.float64) ** 2 + 1e-30  # of the first step: its decay is 0
    row, column = squares.mean(1, keepdims=True), squares.mean(0, keepdims=True)
    scaled = g / np.sqrt(row * column / row.mean())
    scaled /= max(1.0, np.sqrt((scaled**2).mean()))
    np.testing.assert_allclose(updates["w"], -0.1 * (scaled + 0.5 * w), rtol=1e-4, atol=1e-6)
