"""Directories and secrets: the only module that reads environment variables."""

import os
from pathlib import Path


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


def api_keys() -> tuple[str, ...]:
    """Keys that the server's clients must send: `TENFOLD_API_KEY`, several separated by commas; none if it is unset."""
    return tuple(key.strip() for key in os.environ.get("TENFOLD_API_KEY", "").split(",") if key.strip())
