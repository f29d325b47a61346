"""Fine-tune so that no one can tell whose data it was. Run: python examples/04_private_fine_tuning.py

DP-SGD (Abadi et al., 2016): each example's gradient is cut to the length CLIP, and noise of NOISE · CLIP is added to
their sum. Every step uses each example once: ρ-zCDP with ρ = STEPS / (2 NOISE²), and so (ε, δ)-private with ε = ρ +
2 √(ρ ln 1/δ) (Bun and Steinke, 2016), where neighbouring data differ by one example.
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

CLIP, NOISE, STEPS, RATE, DELTA = 1.0, 4.0, 20, 2e-3, 1e-3
TALKS = [conversation(f"Where is number {n}?", f"Number {n} is at home.") for n in range(32)]


def main() -> None:
    """Teach the built-in model privately, and say what that cost."""
    begun = start(TuningConfig(lora=LoraConfig(r=1, target_modules=("v_proj",)), max_length=32))
    job = begun.job(full_training(begun.model))
    rows = alone([example for talk in TALKS for example in encode_conversation(begun.tokenizer, talk, 32)], 32, 0)
    batches, (flat, unravel) = jax.tree.map(lambda x: x[:, None], rows), ravel_pytree(job.initial())  # of one row each
    each = jax.jit(jax.vmap(jax.value_and_grad(lambda w, row: job.loss(unravel(w), job.frozen, row).mean), (None, 0)))
    for key in jax.random.split(jax.random.key(0), STEPS):
        _, gradients = each(flat, batches)
        cut = jnp.minimum(1, CLIP / jnp.linalg.norm(gradients, axis=1))
        flat -= RATE * (cut @ gradients + NOISE * CLIP * jax.random.normal(key, flat.shape))
    rho = STEPS / (2 * NOISE**2)
    epsilon, loss = rho + 2 * jnp.sqrt(rho * jnp.log(1 / DELTA)), each(flat, batches)[0].mean()
    print(f"(ε = {epsilon:.1f}, δ = {DELTA})-private adapters; their loss, which is not private, is {loss:.3f}")


if __name__ == "__main__":
    main()
