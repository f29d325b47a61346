"""Attention of a decoding step at 32k tokens of context on a CPU: the share of the memory bandwidth that it reaches.

One sequence and the heads of a Llama of 0.5 B weights; each layer has a cache of its own, larger together than any
cache of the processor. Bandwidth and attention are measured in turn, and bytes are those of keys, values and scales.
Memory must not grow while it runs: a copy of one layer's cache would be seen.
"""

import argparse
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from bandwidth import read_bandwidth

from tenfold.kernels import native
from tenfold.kernels.attention import AttentionSpec
from tenfold.kernels.paged_attention import NativeCache, RaggedBatch, make_native_cache, page_bytes, update

TOKENS, PAGE, KV_HEADS, HEAD_DIM, GROUP = 32_768, 32, 8, 128, 2
LAYERS = 4
ASKED = 0.8
ACTIVATIONS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "bfloat16"}  # of each dtype of the cache


def make_step(held: str) -> tuple[list[NativeCache], jax.stages.Wrapped]:
    """Full caches, in pages out of order, and a function of them that attends to each with a new token."""
    pages = TOKENS // PAGE
    rng = np.random.default_rng(0)
    batch = RaggedBatch(
        block_tables=jnp.asarray(1 + rng.permutation(pages)[None], jnp.int32),
        kv_lens=jnp.asarray([TOKENS], jnp.int32),
        query_starts=jnp.asarray([0, 1], jnp.int32),
        num_decodes=jnp.asarray(1, jnp.int32),
        num_seqs=jnp.asarray(1, jnp.int32),
    )
    shapes = [(1, heads, HEAD_DIM) for heads in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS)]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), ACTIVATIONS[held]) for shape in shapes)
    spec = AttentionSpec(scale=HEAD_DIM**-0.5)

    def step(caches: list[NativeCache]) -> tuple[jax.Array, list[NativeCache]]:
        done = [update(q, k, v, cache, batch, spec) for cache in caches]
        return sum((out for out, _ in done), jnp.zeros(())), [cache for _, cache in done]

    caches = [make_native_cache(pages + 1, PAGE, KV_HEADS, HEAD_DIM, held) for _ in range(LAYERS)]
    return jax.tree.map(lambda x: x + 1, caches), jax.jit(step, donate_argnums=0)  # added to, so that pages are there


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Prints a line per dtype of the cache, and its share last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    if native.library() is None:
        raise SystemExit("the native operations are not built here; see `tenfold doctor`")
    for held in ACTIVATIONS:
        caches, step = make_step(held)
        nbytes = LAYERS * TOKENS // PAGE * page_bytes(PAGE, KV_HEADS, HEAD_DIM, held)
        out, caches = jax.block_until_ready(step(caches))
        read_bandwidth(repeats=1)  # so that its blocks, too, are in what is compared with
        before = peak_memory()
        rates: list[float] = []
        shares: list[float] = []
        for _ in range(repeats):
            start = time.perf_counter()
            out, caches = jax.block_until_ready(step(caches))
            rates.append(nbytes / (time.perf_counter() - start))
            shares.append(rates[-1] / read_bandwidth(repeats=2))
        del out, caches
        grown = (peak_memory() - before) / (nbytes / LAYERS)
        print(f"{held}: {statistics.median(rates) / 1e9:.1f} GB/s; memory grew by {grown:.2f} of one layer's cache")
        print(f"ratio, {held} cache at 32k tokens, to the bandwidth: {statistics.median(shares):.2f} (asked: {ASKED})")


if __name__ == "__main__":
    main()
