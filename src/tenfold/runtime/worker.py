"""The program of the engine's process: `python -m tenfold.runtime.worker FD`.

FD is the worker's end of a socket pair, inherited from the server. A fresh interpreter runs it, not a fork, because a
fork of a process with threads or an open device is not safe.
"""

import socket
import sys
from collections.abc import Callable
from pathlib import Path

from tenfold.engine.engine import Engine
from tenfold.runtime.engine_loop import run_worker
from tenfold.runtime.messages import Launch


def load(launch: Launch, report: Callable[[int, int], None]) -> Engine:
    """The engine that a launch asks for, warm."""
    return Engine.from_pretrained(Path(launch.model_path), launch.config, report)


if __name__ == "__main__":
    sys.exit(run_worker(socket.socket(fileno=int(sys.argv[1])), load))
