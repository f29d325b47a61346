"""Keeping compiled programs, and counting compilations: after an engine is ready, each one is a bug."""

import logging
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

log = logging.getLogger(__name__)

COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
    """The number of XLA compilations by threads while they are in `watched`, until `stop`.

    Whatever else the process compiles, for another engine or in training, is no concern of this one.
    """

    def __init__(self) -> None:
        self.count = 0
        self._watched: int | None = None
        monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED and threading.get_ident() == self._watched:
            self.count += 1
            log.warning("a compilation of %.2f s after the engine was ready: please report it", duration_secs)

    @contextmanager
    def watched(self) -> Generator[None]:
        """Counts what the calling thread compiles."""
        self._watched = threading.get_ident()
        try:
            yield
        finally:
            self._watched = None

    def stop(self) -> None:
        """Counts no more; once only."""
        monitoring.unregister_event_duration_listener(self._listen)


def keep_programs(directory: Path) -> None:
    """Keeps what this process compiles from now on in `directory`, and takes it from there where it is.

    A directory that the process or its environment has already given to JAX is left as it is.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        compilation_cache.reset_cache()  # else a process that has compiled before would go on without
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@contextmanager
def without_jax_cache() -> Generator[None]:
    """Compiles without JAX's own cache, in all threads."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def programs_directory() -> Path | None:
    """Where whole programs are kept, beside what JAX keeps; None where nothing is."""
    directory = jax.config.values["jax_compilation_cache_dir"]
    return None if directory is None or "://" in directory else Path(directory) / "programs"
