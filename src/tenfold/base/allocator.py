"""Keeping freed memory in the process: on a CPU, XLA allocates a step's temporaries anew every time."""

import ctypes
import platform

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = -1


def keep_freed_memory() -> bool:
    """Tells glibc to reuse large blocks instead of returning them to the system at once.

    Blocks above 32 MiB are otherwise mapped and unmapped at every step, and each of their pages faults again: 16 greedy
    rows of 128,256 logits took 18 ms to sample instead of 3, and training 25 M weights took 12 % longer a step. The
    price lies between kept blocks: where little is put into a large one, the next of that size needs new memory. With
    1.1 GB of temporaries a step that training grew from 1.8 to 5 GB in 20 steps, and no further in 50 more.

    Returns:
        Whether there was a glibc to tell.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER))
    return all(libc.mallopt(option, value) == 1 for option, value in settings)
