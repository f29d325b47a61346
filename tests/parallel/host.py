"""One host of a run of several, for `test_hosts`: computes with the others, and says so, until it is killed.

python -m tests.parallel.host STEPS
"""

import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from tenfold.base.errors import TenfoldError
from tenfold.parallel import hosts
from tenfold.parallel.layout import Layout
from tenfold.parallel.mesh import parse_mesh
from tenfold.parallel.sharding import make_mesh

MESHES = ("data=4", "tensor=4", "data=2,tensor=2", "pipeline=2,data=2", "fsdp=2,context=2", "data=2", "")


def shares(mesh: str) -> list[int] | str:
    """Which share of the rows each host has, or why it cannot be so."""
    try:
        return list(Layout(make_mesh(parse_mesh(mesh)) if mesh else None).row_shares)
    except TenfoldError as error:
        return str(error)


def main(steps: int) -> None:
    with hosts.joined_hosts() as count:
        print("shares", json.dumps({mesh: shares(mesh) for mesh in MESHES}), flush=True)
        layout = Layout(make_mesh({"data": count * jax.local_device_count()}))
        own = np.full((jax.local_device_count(), 4), jax.process_index() + 1, np.float32)
        rows = jax.make_array_from_process_local_data(layout.rows, own)
        total = jax.jit(jnp.sum)
        for step in range(steps):
            print(step, float(total(rows * (step + 1))), flush=True)
            time.sleep(0.05)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except TenfoldError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(3)  # jax would wait for the others
