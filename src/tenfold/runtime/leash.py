"""Runs a module as a program that does not outlive the process that started it, not even one that was killed.

python -m tenfold.runtime.leash MODULE [ARGUMENT...]

Standard input is a pipe that the other process keeps open, and writes nothing to.
"""

import os
import runpy
import signal
import sys
import threading


def main() -> None:
    """Run the program."""
    threading.Thread(target=_end_with_the_other, daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _end_with_the_other() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
