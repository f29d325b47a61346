"""Engine processes that a test starts, and that are gone when it ends."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tenfold.engine.config import EngineConfig
from tenfold.runtime import EngineProcess, Watchdog
from tenfold.testing.scripted_engine import Script, worker_command

StartEngine = Callable[..., Awaitable[EngineProcess]]


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[StartEngine]:
    """Makes `EngineProcess`es around a scripted engine; they are started unless `start=False`."""
    made: list[EngineProcess] = []

    async def make(
        script: Script | None = None,
        *,
        config: EngineConfig | None = None,
        watchdog: Watchdog | None = None,
        start: bool = True,
    ) -> EngineProcess:
        command = worker_command(script or Script())
        process = EngineProcess(tmp_path, config or EngineConfig(), watchdog=watchdog, command=command)
        made.append(process)
        if start:
            await process.start()
        return process

    yield make
    for process in made:
        await process.stop(0.0)
