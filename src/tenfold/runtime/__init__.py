"""An engine in a process of its own, watched: started, fed, restarted and shut down from an asyncio program.

`EngineProcess` is the server's view. It talks to `worker` over a socket pair, in the `messages` of both directions.
Only `worker` loads jax, in its own process; whoever imports the rest starts in milliseconds.
"""

from tenfold.runtime.engine_process import EngineProcess, Watchdog

__all__ = ["EngineProcess", "Watchdog"]
