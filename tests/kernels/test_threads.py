"""The native operations give the same bits whatever the number of threads among which XLA spreads them."""

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.kernels import native
from tenfold.kernels.attention import AttentionSpec
from tenfold.kernels.matmul import matmul
from tenfold.kernels.norm import rms_norm
from tenfold.kernels.product import multiply
from tenfold.kernels.row_attention import row_attention
from tests.kernels import test_native_attention as attention
from tests.kernels.test_matmul import draw, formats

pytestmark = [
    pytest.mark.usefixtures("optimised"),
    pytest.mark.skipif(native.library() is None, reason="the native kernels are not built"),
]

ROOT = Path(__file__).parents[2]
ROWS = (1, 7, 64, 300)


def digest(*arrays: Any) -> str:
    found = hashlib.sha256()
    for x in arrays:
        found.update(np.asarray(0 if x is None else x).tobytes())
    return found.hexdigest()


def products() -> dict[str, str]:
    rng, found = np.random.default_rng(0), {}
    weights, x = formats(rng, 512, 640), draw(rng, max(ROWS), 512)
    for dtype in ("float32", "bfloat16"):
        for i, weight in enumerate(weights):
            if dtype == "bfloat16" and weight.bits == 32:
                continue
            results = [matmul(jnp.asarray(x[:rows], dtype), weight)[0] for rows in ROWS]
            found[f"{dtype} by {weight.bits} bits, {i}"] = digest(*results)
    return found


def norms() -> dict[str, str]:
    x = draw(np.random.default_rng(1), max(ROWS), 512)
    weight = np.linspace(0.5, 2, 512, dtype=np.float32)
    return {
        f"norm in {dtype}": digest(
            *(rms_norm(jnp.asarray(x[:n], dtype), jnp.asarray(weight, dtype), 1e-5) for n in ROWS)
        )
        for dtype in ("float32", "bfloat16")
    }


def attentions() -> dict[str, str]:
    """Every kind of work: one long row, many rows, and writing."""
    found = {}
    for queries, cache in attention.PAIRS:
        heads = attention.Heads(J=3, G=2, K=32, queries=queries, cache=cache)
        rng = np.random.default_rng(3)
        lengths = (2 * attention.SPLIT + 100, 700, 90, 33, 5)
        sequences = [attention.draw_sequence(rng, heads, n) for n in lengths]
        if not heads.scaled:  # products that are subnormal, which threads may or may not flush to 0
            sequences[1] = sequences[1]._replace(v=(sequences[1].v * 1e-37).astype(cache))
        case = attention.Case(heads, sequences)
        alone = case.run([(0, lengths[0] - 1, lengths[0])], AttentionSpec(0.3))
        parts = [(row, end // 2, end) for row, end in enumerate(lengths[1:], 1)]
        several = case.run(parts, AttentionSpec(0.3, window=200, softcap=10.0))
        q = jnp.asarray(case.queries(parts))
        k = q[:, : heads.J]
        out, after = attention.run_update(q, k, k * 2, case.cache(), case.batch(parts), spec=AttentionSpec(0.3))
        found[f"attention of {queries} to {cache}"] = digest(alone, several, out, *after)
    return found


def training() -> dict[str, str]:
    """What only training computes: products of two matrices as they are, and attention with its gradient."""
    rng = np.random.default_rng(4)
    a, b = jnp.asarray(draw(rng, 500, 700)), jnp.asarray(draw(rng, 700, 90))
    spec, heads = AttentionSpec(0.3), [jnp.asarray(draw(rng, 6, 100 * 32).reshape(2, 100, 3, 32)) for _ in range(3)]

    def read(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return row_attention(q, k, v, jnp.zeros((2, 100), jnp.int32), spec)

    out, back = jax.vjp(read, *heads)
    moved = back(out)
    squares = multiply(b, b, a_transposed=True), multiply(a, a, b_transposed=True)
    return {"product": digest(multiply(a, b), *squares), "attention of rows": digest(out, *moved)}


OPERATIONS: dict[str, Callable[[], dict[str, str]]] = {
    "products": products,
    "norms": norms,
    "attention": attentions,
    "training": training,
}


@functools.cache
def digests(operation: str) -> dict[str, str]:
    """Of this process, whose pool has a thread for each of the devices that the tests pretend to have, or more."""
    with jax.default_device(jax.devices()[0]):  # of several, which XLA would have to split some operations over
        return OPERATIONS[operation]()


def report() -> str:
    """The digests of this process, and how many threads XLA's pool has."""
    found = {name: make() for name, make in OPERATIONS.items()}
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return json.dumps({"threads": names.count("tf_XLAEigen"), "digests": found})


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from tests.kernels.test_threads import report; print(report())"],
        env=os.environ | {"NPROC": str(threads), "JAX_NUM_CPU_DEVICES": "1"},  # which set the size of XLA's pool
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["threads"] == threads
    assert found["digests"] == {name: digests(name) for name in OPERATIONS}
