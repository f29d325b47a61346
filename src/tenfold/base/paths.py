"""Directories, secrets, and a process's place among others: the only module that reads environment variables."""

import os
from collections.abc import Mapping
from pathlib import Path

from tenfold.base.errors import ConfigError


def cache_dir() -> Path:
    """Where Tenfold keeps what it can make again (downloads, compiled programs); not created here.

    `TENFOLD_CACHE_DIR`, else `tenfold` under `XDG_CACHE_HOME` (XDG Base Directory Specification: relative values are
    ignored), else `~/.cache/tenfold`.
    """
    own = os.environ.get("TENFOLD_CACHE_DIR")
    if own:
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "tenfold"


def xla_flags() -> str:
    """`XLA_FLAGS`, which change what is compiled."""
    return os.environ.get("XLA_FLAGS", "")


def api_keys() -> tuple[str, ...]:
    """Keys that the server's clients must send: `TENFOLD_API_KEY`, several separated by commas; none if it is unset."""
    return tuple(key.strip() for key in os.environ.get("TENFOLD_API_KEY", "").split(",") if key.strip())


COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def in_cluster(coordinator: str, count: int, index: int) -> Mapping[str, str]:
    """The environment of a process to start, which will find its place by `cluster`; otherwise that of this one."""
    return os.environ | {COORDINATOR: coordinator, PROCESSES: str(count), PROCESS: str(index)}


def cluster() -> tuple[str, int, int] | None:
    """The first process's host:port, the number of processes, and the index of this one; None if it is alone.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, as what starts them sets these. Raises
    ConfigError if the first is set and the others are not numbers that fit.
    """
    coordinator = os.environ.get(COORDINATOR)
    if not coordinator:
        return None
    count, index = (os.environ.get(name, "") for name in (PROCESSES, PROCESS))
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES ({count!r}) must say how many processes there are, "
            f"and JAX_PROCESS_ID ({index!r}) which this is, counted from 0"
        )
    return coordinator, int(count), int(index)
