"""The memory bandwidth of this machine, as reading can reach it: the floor under every decoding step."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

SIZE = 2**28  # float32 per thread's block: 1 GiB, far beyond any cache


def read_bandwidth(threads: int | None = None, repeats: int = 5) -> float:
    """Bytes per second of the best of several passes in which every thread sums the squares of its own block."""
    threads = threads or os.cpu_count() or 1
    blocks = [np.ones(SIZE // threads, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(lambda block: float(np.dot(block, block)), blocks))
            best = max(best, SIZE * 4 / (time.perf_counter() - start))
    return best


if __name__ == "__main__":
    print(f"{read_bandwidth() / 1e9:.1f} GB/s")
