"""What depth costs at start-up: tracing and compiling a step of 4, 28 and 80 layers, and its temporaries."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import HALF_BILLION

from tenfold.base.reach import FULL
from tenfold.engine import programs
from tenfold.engine.programs import StepBatch
from tenfold.models.family import Model, resolve
from tenfold.nn.param import abstract

PAGES, PAGE, BLOCKS, SLOTS, LENGTH = 64, 32, 32, 16, 1024


def lower(model: Model, tokens: int, rows: int, *, decode_only: bool) -> Any:
    """The step program of one bucket, lowered without any memory."""
    ints = partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    batch = StepBatch(
        slots=ints((tokens,)),
        positions=ints((tokens,)),
        pages=(ints((tokens,)),),
        offsets=ints((tokens,)),
        block_tables=(ints((rows, BLOCKS)),),
        kv_lens=ints((rows,)),
        query_starts=ints((rows + 1,)),
        num_decodes=ints(()),
        num_seqs=ints(()),
        last=ints((rows,)),
    )
    caches = jax.eval_shape(
        lambda: jax.tree.map(
            lambda spec: spec.make(PAGES, PAGE, np.float32, native=False, held=np.float32), list(model.cache_specs())
        )
    )
    kind = programs.StepKind((FULL,), PAGE, decode_only, 0 if decode_only else tokens)
    step = partial(programs.forward, model=model, kind=kind)
    history = ints((SLOTS + 1, LENGTH))
    return jax.jit(step, donate_argnums=1).lower(abstract(model.params(), jnp.float32), caches, history, batch)


def main() -> None:
    """Prints a row per depth and kind of step; last, how 80 layers compare with 4."""
    seconds: dict[tuple[int, bool], float] = {}
    print(f"{'layers':>6s} {'step':>18s} {'trace and lower':>16s} {'compile':>8s} {'temporaries':>12s}")
    for layers in (4, 28, 80):
        model = resolve(HALF_BILLION | {"num_hidden_layers": layers})
        for decode_only, tokens in ((True, 16), (False, 256)):
            start = time.perf_counter()
            lowered = lower(model, tokens, 16, decode_only=decode_only)
            traced = time.perf_counter()
            compiled = lowered.compile()
            end = time.perf_counter()
            seconds[layers, decode_only] = end - start
            temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
            step = f"{'decode' if decode_only else 'mixed'} of {tokens}"
            print(f"{layers:6d} {step:>18s} {traced - start:14.2f} s {end - traced:6.2f} s {temporaries:8.0f} MiB")
    print(f"ratio, 80 layers to 4: {seconds[80, False] / seconds[4, False]:.1f}x")


if __name__ == "__main__":
    main()
