"""The inference engine: requests of token ids in, sampled tokens out, over a paged cache.

One step is `schedule → run → commit`. The scheduler and the page pool are host code without jax; the runner owns the
device. The one invariant: computed tokens catch up with known tokens, within a token budget.
"""
