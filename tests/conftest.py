"""What holds for every test: strict JAX semantics on four CPU devices, and repeatable generated cases.

JAX reads its settings from the environment when it is first imported, so they are set here, before that, and tests
that need no JAX do not pay for importing it. Processes that a test starts inherit them.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

STRICT_JAX = {
    "JAX_NUM_CPU_DEVICES": "4",  # so that sharding over a mesh is tested without accelerators
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
}
os.environ.update(STRICT_JAX)
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # `make gpu` names another
os.environ["HF_HUB_OFFLINE"] = "1"  # no test depends on the network
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # all processes of a session share what is slow to compile
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tenfold-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


# Array annotations are checked as tests run, in the modules that have any: each call that is checked takes microseconds
# more, and declarations of large models and the engine's bookkeeping, which have none, make hundreds of thousands.
SOURCE = Path(__file__).resolve().parent.parent / "src"
ANNOTATED = [path for path in sorted(SOURCE.rglob("*.py")) if "from jaxtyping import" in path.read_text()]
install_import_hook(
    [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in ANNOTATED], "beartype.beartype"
)

# The same cases in every run, without a deadline, because compiling takes longer than running.
# `pytest --hypothesis-profile explore` looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeatable")


@pytest.fixture
def optimised() -> Iterator[None]:
    """Programs as users have them, in `make test` too: what is not fused or vectorised rounds alike more easily. For
    tests of results that are alike to the last bit."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
