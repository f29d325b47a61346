"""`tenfold doctor`: what Tenfold runs on here, and whether it works."""

from collections.abc import Callable, Iterator
from typing import Annotated

import typer

_PACKAGES = ("tenfold", "jax", "jaxlib", "numpy", "tokenizers", "fastapi", "uvicorn")
_PROBE = """
import jax
for device in jax.devices():
    limit = (device.memory_stats() or {}).get("bytes_limit")
    print(f"{device.platform}:{device.id} {device.device_kind}" + (f", {limit / 2**30:.1f} GiB" if limit else ""))
from tenfold.kernels import native
if jax.devices()[0].platform == "cpu":
    print(f"native kernels: {native.instruction_set() or 'none; ' + native.REMEDY}")
"""
_QUESTION = "What does os.path.join do?"


def doctor(timeout: Annotated[float, typer.Option(help="Seconds that each check may take.")] = 300.0) -> None:
    """Show versions, devices, memory and caches, and generate one token with the built-in model.

    Ends with status 1 if something does not work.
    """
    checks: dict[str, Callable[[float], Iterator[str]]] = {
        "versions": _versions,
        "memory": _memory,
        "caches": _caches,
        "devices": _devices,
        "generation": _generation,
    }
    broken = [name for name, check in checks.items() if not _show(name, check, timeout)]
    if broken:
        print(f"Not working: {', '.join(broken)}.")
        raise typer.Exit(1)
    print("Everything works.")


def _show(name: str, check: Callable[[float], Iterator[str]], timeout_s: float) -> bool:
    """Print what a check finds, under its name; False if it fails."""
    print(name)
    try:
        for line in check(timeout_s):
            print(f"  {line}")
    except Exception as error:  # noqa: BLE001 - a check may fail in any way, and saying how is what this is for
        print(f"  FAILED: {type(error).__name__}: {error}")
        return False
    return True


def _versions(_: float) -> Iterator[str]:
    import importlib.metadata
    import platform

    yield f"python {platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        yield f"{package} {importlib.metadata.version(package)}"


def _memory(_: float) -> Iterator[str]:
    import os

    import psutil

    memory = psutil.virtual_memory()
    yield f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB available, {os.cpu_count()} CPUs"


def _caches(_: float) -> Iterator[str]:
    from tenfold.base.paths import cache_dir

    directory = cache_dir()
    if not directory.is_dir():
        yield f"{directory} (empty)"
        return
    sizes = [file.stat().st_size for file in directory.rglob("*") if file.is_file()]
    yield f"{directory}: {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB"


def _devices(timeout_s: float) -> Iterator[str]:
    """In a process of its own: a device that another program holds can make the search for devices hang."""
    import subprocess
    import sys

    found = subprocess.run(
        [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    if found.returncode:
        raise RuntimeError(found.stderr.strip().splitlines()[-1] if found.stderr.strip() else "jax cannot be loaded")
    yield from found.stdout.splitlines()


def _generation(timeout_s: float) -> Iterator[str]:
    """One token of the built-in model, from an engine in a process of its own."""
    import asyncio
    import time

    from tenfold.base.builtin import BUILTIN_MODEL, builtin_model
    from tenfold.data.tokenizer import Tokenizer
    from tenfold.engine.config import EngineConfig
    from tenfold.engine.sampling_params import SamplingParams
    from tenfold.runtime.engine_process import EngineProcess, Watchdog

    tokenizer = Tokenizer.load(builtin_model())
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": _QUESTION}])
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    config = EngineConfig(max_model_len=256, max_num_seqs=1, max_num_batched_tokens=64, cache_memory=2**26)

    async def generate() -> tuple[str, str]:
        engine = EngineProcess(builtin_model(), config, watchdog=Watchdog(max_starts=1))
        async with asyncio.timeout(timeout_s):
            await engine.start()
            try:
                outputs = engine.generate("doctor", ids, SamplingParams(temperature=0.0, max_tokens=1))
                tokens = [token async for output in outputs for token in output.token_ids]
                return (engine.info.device if engine.info else "?"), tokenizer.decode(tokens)
            finally:
                await engine.stop(0.0)

    began = time.perf_counter()
    device, text = asyncio.run(generate())
    yield f"{BUILTIN_MODEL} on {device} answers {_QUESTION!r} beginning with {text!r}"
    yield f"{time.perf_counter() - began:.1f} s, loading and compiling included"
