"""How long until pico is ready, cold and warm, and what `tenfold --help` takes."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TENFOLD = str(Path(sys.executable).parent / "tenfold")


def time_until_ready(cache: str) -> float:
    """Seconds from typing `tenfold serve` to its word that it is ready, with this compilation cache."""
    environment = os.environ | {"TENFOLD_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    process = subprocess.Popen([TENFOLD, "serve", "--port", "0"], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    ready = any("curl" in line for line in process.stdout)  # the greeting: how to talk to it
    seconds = time.perf_counter() - start
    process.terminate()
    process.communicate()
    if not ready:
        raise SystemExit("the server did not start; see its message above")
    return seconds


def time_help() -> float:
    """Seconds of `tenfold --help`."""
    start = time.perf_counter()
    subprocess.run([TENFOLD, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Prints medians beside what is asked."""
    with tempfile.TemporaryDirectory() as cache:
        cold = time_until_ready(cache)
        warm = statistics.median(time_until_ready(cache) for _ in range(3))
    shown = statistics.median(time_help() for _ in range(5))
    print(f"pico ready, cold: {cold:.1f} s (asked: at most 30)")
    print(f"pico ready, warm: {warm:.1f} s (asked: at most 8)")
    print(f"tenfold --help: {shown:.2f} s (asked: at most 0.5)")


if __name__ == "__main__":
    main()
