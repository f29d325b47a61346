"""Processes, watched and started again: an engine's, of an asyncio program, and a run's on the hosts of a cluster.

`EngineProcess` is the server's view. It talks to `worker` over a socket pair, in the `messages` of both directions.
Only `worker` loads jax, in its own process; whoever imports the rest starts in milliseconds. `ray_gang` runs a command
on all hosts of a Ray cluster, and `jobset` says how Kubernetes would.
"""

from tenfold.runtime.engine_process import EngineProcess, Watchdog

__all__ = ["EngineProcess", "Watchdog"]
