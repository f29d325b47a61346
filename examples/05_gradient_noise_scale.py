"""Estimate which batch is worth its price. Run: python examples/05_gradient_noise_scale.py

The noise scale (McCandlish et al., 2018): B = tr Σ / |G|², of the covariance Σ of examples' gradients and the true
gradient G. Both are estimated without bias, from the gradients of single examples and of all together (appendix A.1).
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from tenfold.data.supervision import encode_conversation
from tenfold.nn.lora import LoraConfig
from tenfold.train.adapters import TuningConfig, start
from tenfold.train.example_batches import alone
from tenfold.train.loss import full_training
from tenfold.train.pico.conversations import conversation

NAMES = ["os.path.join", "shutil.copytree", "json.dumps", "re.sub", "math.sqrt", "random.choice", "ast.parse"]
TALKS = [conversation(f"In which module is {name}?", f"{name} is in {name.rpartition('.')[0]}.") for name in NAMES]


def main() -> None:
    """Estimate it for adapters of the built-in model."""
    begun = start(TuningConfig(lora=LoraConfig(r=4), max_length=32))
    job = begun.job(full_training(begun.model))
    rows = alone([example for talk in TALKS for example in encode_conversation(begun.tokenizer, talk, 32)], 32, 0)
    batches = jax.tree.map(lambda x: x[:, None], rows)  # a batch of one row for each example
    flat, unravel = ravel_pytree(job.initial())
    grad = jax.grad(lambda flat, batch: job.loss(unravel(flat), job.frozen, batch).mean)
    gradients = jax.jit(jax.vmap(grad, in_axes=(None, 0)))(flat, batches)
    single, whole, n = jnp.square(gradients).sum(1).mean(), jnp.square(gradients.mean(0)).sum(), len(gradients)
    signal, noise = (n * whole - single) / (n - 1), (single - whole) / (1 - 1 / n)
    print(f"|G|² = {signal:.4g}, tr Σ = {noise:.4g}: the noise scale is {noise / signal:.1f} conversations")


if __name__ == "__main__":
    main()
