"""What mixes tokens, where rows are shared out over a context: as on one device, and so are its gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.kernels.attention import AttentionSpec, Heads
from tenfold.kernels.convolution import Convolution, ConvolutionSpec
from tenfold.kernels.latent_attention import Latents, LatentSpec
from tenfold.kernels.recurrence import Recurrence, RecurrenceSpec
from tenfold.nn.packed import packed_attend
from tenfold.parallel.layout import NOWHERE, Layout
from tenfold.parallel.sharding import make_mesh

R, L = 2, 32
SPECS = {
    "full": AttentionSpec(0.4),
    "window": AttentionSpec(0.4, window=7, softcap=2.0),
    "chunk": AttentionSpec(0.4, chunk=6),
    "sinks": AttentionSpec(0.3, window=20),
    "latent": LatentSpec(0.3),
    "convolution": ConvolutionSpec(),
    "recurrence": RecurrenceSpec(),
}


def make_inputs() -> tuple[dict[str, Any], jax.Array]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def tokens(*dims: int) -> jax.Array:
        return draw(R, L, *dims)

    def heads(sinks: jax.Array | None = None) -> Heads:
        return Heads(tokens(4, 6), tokens(2, 6), tokens(2, 6), sinks)

    inputs = {
        "full": heads(),
        "window": heads(),
        "chunk": heads(),
        "sinks": heads(draw(4)),
        "latent": Latents(tokens(2, 4), tokens(2, 3), tokens(5), tokens(3), draw(2, 4, 5), draw(2, 6, 5)),
        "convolution": Convolution(tokens(3), draw(3, 4), draw(3)),
        "recurrence": Recurrence(tokens(1, 4), tokens(1, 4), tokens(2, 3), -jnp.abs(tokens(2)), None),
    }
    lengths = [[5, 20, 7], [32, 0, 0]]
    segments = jnp.asarray([np.repeat([1, 2, 3], row) for row in lengths], jnp.int32)
    return inputs, segments


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("full", "chunk"))) for name in SPECS]
)
def test_a_shared_row_is_mixed_as_a_whole_one(name: str) -> None:
    inputs, segments = make_inputs()

    def run(mixed: Any, layout: Layout) -> tuple[jax.Array, jax.Array]:
        flat = jax.tree.map(lambda x: layout.flatten(x) if x.shape[:2] == (R, L) else x, mixed)
        result = layout.unflatten(packed_attend(segments, layout)(flat, None, SPECS[name])[0], R)
        return jnp.sin(result + 1).sum(), result

    gradient = jax.jit(jax.grad(run, has_aux=True), static_argnums=1)
    (gradients, result), (shared_gradients, shared_result) = (
        gradient(inputs[name], layout) for layout in (NOWHERE, Layout(make_mesh({"context": 4})))
    )
    np.testing.assert_allclose(shared_result, result, rtol=1e-5, atol=1e-5)
    for ours, expected in zip(jax.tree.leaves(shared_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)


def test_no_device_holds_all_keys_of_a_row() -> None:
    inputs, segments = make_inputs()
    layout = Layout(make_mesh({"context": 4}))
    attend = packed_attend(segments, layout)

    def run(heads: Heads) -> jax.Array:
        flat = Heads(*(layout.flatten(x) for x in heads[:3]))
        return attend(flat, None, SPECS["full"])[0].sum()

    hlo = jax.jit(jax.grad(run)).lower(inputs["full"]).compile().as_text()
    assert "collective-permute" in hlo
    assert "all-gather" not in hlo
