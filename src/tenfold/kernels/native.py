"""The native CPU operations: a shared library that the package's build compiles, called by XLA through its FFI.

Without it (no compiler when the package was built, or another platform) everything runs on XLA's own operations.
"""

import ctypes
import functools
import logging
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)

LIBRARY = "tenfold/kernels/libtenfold_native.so"  # beside this file, or where an editable install keeps what it built
TARGETS = (
    "tenfold_gate",
    "tenfold_layer_norm",
    "tenfold_matmul",
    "tenfold_matmul_quantized",
    "tenfold_grouped_matmul",
    "tenfold_grouped_matmul_quantized",
    "tenfold_paged_attention",
    "tenfold_paged_attention_update",
    "tenfold_product",
    "tenfold_rms_norm",
    "tenfold_row_attention",
    "tenfold_row_attention_gradient",
)
INSTRUCTION_SETS = ("avx512_bf16", "avx512_vnni", "avx2", "baseline")
REMEDY = "Products run on XLA, several times slower. Install a C++ compiler and reinstall tenfold to have them."


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library, its operations made known to XLA; None, and a line in the log, if there is none."""
    file = Path(str(distribution("tenfold").locate_file(LIBRARY)))
    if not file.exists():
        log.warning("The native CPU kernels are not built. %s", REMEDY)
        return None
    try:
        loaded = ctypes.CDLL(str(file))
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
        loaded.tenfold_instruction_set.restype = ctypes.c_char_p
        loaded.tenfold_use.restype = ctypes.c_bool
    except (OSError, AttributeError, RuntimeError) as error:
        log.warning("%s cannot be used: %s. %s", file, error, REMEDY)
        return None
    return loaded


def instruction_set() -> str | None:
    """The instruction set whose operations run, the widest that this machine has; None without the library."""
    found = library()
    return None if found is None else found.tenfold_instruction_set().decode()


def use(name: str) -> bool:
    """Makes later calls of this process use another of `INSTRUCTION_SETS`, to test or measure it.

    Returns whether the machine has it.
    """
    found = library()
    return found is not None and bool(found.tenfold_use(name.encode()))


def available(device: Any) -> bool:
    """Whether native operations can serve this device."""
    return device.platform == "cpu" and library() is not None


def serves_alone() -> bool:
    """Whether all that is computed is on one CPU, the only device or `jax.default_device`: XLA cannot split them over
    several, and would gather in each what they read."""
    one_device = jax.device_count() == 1 or jax.config.values["jax_default_device"] is not None
    return (
        one_device
        and jax.sharding.get_abstract_mesh().empty
        and jax.default_backend() == "cpu"
        and library() is not None
    )


def suits(*arrays: jax.Array) -> bool:
    """Whether operations of rows take these: all float32 or all bfloat16, where one CPU serves alone."""
    return {x.dtype.name for x in arrays} in ({"float32"}, {"bfloat16"}) and serves_alone()
