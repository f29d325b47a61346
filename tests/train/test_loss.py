"""The training loss against its formula, and against the model run one document at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.data.packing import Rows, pack
from tenfold.models.family import Model, resolve
from tenfold.nn.param import initialize
from tenfold.train.loss import hidden_states, next_token_loss, token_losses

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


states = jax.jit(hidden_states, static_argnums=1)
LONGEST = 12  # tokens of an example


def make_model() -> tuple[Model, dict]:
    model = resolve(CONFIG)
    weights = initialize(model.params(), jax.random.key(0), jnp.float32)
    return model, jax.tree.map(lambda w: w * 10 if w.ndim > 1 else w, weights)


def make_examples(seed: int) -> list[tuple[list[int], list[bool]]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, LONGEST, 7)
    return [(rng.integers(0, 31, n).tolist(), (rng.random(n) < 0.7).tolist()) for n in lengths]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_loss_is_the_weighted_mean_over_documents() -> None:
    model, params = make_model()
    examples = make_examples(0)
    logits_of = jax.jit(model.logits)
    total = weight = 0.0
    for ids, mask in examples:
        n = len(ids)
        tokens = np.asarray([ids + [0] * (LONGEST - n)])  # one shape, so that all documents share one program
        segments, positions = (np.arange(LONGEST) < n).astype(int)[None], np.arange(LONGEST)[None]
        alone = Rows(tokens, segments, positions, np.ones((1, LONGEST), np.float32))
        logits = np.asarray(logits_of(params, states(params, model, alone)[0]))
        scores = log_softmax(logits)
        for i in range(1, n):
            if mask[i]:
                total -= scores[i - 1, ids[i]]
                weight += 1
    packed = pack(examples, 24, 0)
    loss = jax.jit(next_token_loss, static_argnums=1)(params, model, packed)
    np.testing.assert_allclose(float(loss.total), total, rtol=1e-5)
    assert float(loss.weight) == weight
    np.testing.assert_allclose(float(loss.mean), total / weight, rtol=1e-5)


def test_a_document_does_not_see_its_neighbours_in_a_row() -> None:
    model, params = make_model()
    packed = pack(make_examples(1), 24, 0)
    changed = packed._replace(tokens=np.where(packed.segment_ids == 1, 30 - packed.tokens, packed.tokens))
    before, after = (np.asarray(states(params, model, rows)) for rows in (packed, changed))
    others = packed.segment_ids > 1
    np.testing.assert_array_equal(before[others], after[others])
    assert np.abs(before - after)[packed.segment_ids == 1].max() > 1e-3


def test_stacked_layers_have_the_same_loss_and_gradients() -> None:
    model, params = make_model()
    packed = pack(make_examples(2), 24, 0)
    layers = params["layers"]
    stacked = params | {"layers": {"head": [], "scan": [jax.tree.map(lambda *ws: jnp.stack(ws), *layers)], "tail": []}}
    gradient = jax.jit(jax.value_and_grad(lambda params: next_token_loss(params, model, packed).mean))
    loss, grads = gradient(params)
    loss_stacked, grads_stacked = gradient(stacked)
    np.testing.assert_allclose(float(loss), float(loss_stacked), rtol=1e-6)
    for i, layer in enumerate(grads["layers"]):
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a, b[i], rtol=1e-3, atol=1e-6),
            layer,
            grads_stacked["layers"]["scan"][0],
        )


@pytest.mark.parametrize("devices", ["one", "several"])  # which picks the targets' logits, or compares
def test_losses_and_their_gradients_are_the_cross_entropys(devices: str) -> None:
    rng = np.random.default_rng(3)
    logits = (4 * rng.standard_normal((7, 50))).astype(np.float32)
    targets, weights = rng.integers(0, 50, 7), rng.uniform(0.5, 2, 7).astype(np.float32)
    with jax.default_device(jax.devices()[0] if devices == "one" else None):
        losses, back = jax.vjp(lambda x: token_losses(x, jnp.asarray(targets, jnp.int32)), jnp.asarray(logits))
        (gradient,) = back(jnp.asarray(weights))
    exact = log_softmax(logits.astype(np.float64))
    np.testing.assert_allclose(losses, -exact[np.arange(7), targets], rtol=1e-6, atol=1e-5)
    expected = (np.exp(exact) - np.eye(50)[targets]) * weights[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)
