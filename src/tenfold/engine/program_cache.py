"""Compiled programs kept whole on disk, so that a second start of an engine traces nothing.

JAX's own cache keeps what XLA compiles, but finds it by a program that was traced and lowered first, and that is most
of the time of such a start. Here a program is found by what it is made from: this package's sources, JAX, the device,
the model's configuration, and the shapes of the arguments.

A kept program is native code, which whoever can write the directory could replace: one that others may write is not
used.
"""

import functools
import hashlib
import logging
import os
import pickle
import platform
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import tenfold
from tenfold.base.files import atomic_write
from tenfold.base.paths import xla_flags
from tenfold.engine.compilations import without_jax_cache
from tenfold.kernels import native

log = logging.getLogger(__name__)

KEPT_BYTES = 2**32  # in one directory, of the programs that were used last

# On a GPU, XLA records launches as CUDA graphs, and changes a graph when an array lies elsewhere than a step before. In
# an engine some always do, and changing hundreds of nodes takes longer than launching them.
COMPILER_OPTIONS = {"gpu": {"xla_gpu_graph_min_graph_size": 2**31 - 1}}


Job = tuple[str, int]
"""The name of a program, and its size."""


class Program(NamedTuple):
    """A program to be compiled.

    Attributes:
        fn: what `jax.jit` made of a function.
        args: abstract ones.
        about: tells it from all others with the same arguments, such as by the values bound to it.
    """

    fn: Any
    args: tuple[Any, ...]
    about: str


class ProgramCache:
    """The programs of one device in one directory.

    Args:
        directory: where they are; made when the first is kept. None, or one that others may write, keeps nothing.
        device: that they run on.
    """

    def __init__(self, directory: Path | None, device: Any) -> None:
        self._directory = directory if directory is not None and _is_private(directory) else None
        self._device = device

    def take(
        self, programs: Mapping[Job, Program], report: Callable[[int, int], None] | None = None
    ) -> dict[Job, Callable[..., Any]]:
        """Loads the programs that are kept, and compiles and keeps the others, on all cores.

        Args:
            programs: by name, those first that take longest.
            report: is told (done, total).
        """
        # JAX's cache gives back executables that cannot be kept: XLA has dropped what they were linked from.
        without = nullcontext() if self._directory is None else without_jax_cache()
        with without, ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            futures = {job: pool.submit(self._prepare(program)) for job, program in programs.items()}
            taken: dict[Job, Callable[..., Any]] = {}
            for job, future in futures.items():
                taken[job] = future.result()
                if report:
                    report(len(taken), len(futures))
        return taken

    def _prepare(self, program: Program) -> Callable[[], Any]:
        """What a thread has to do; tracing is done here, since threads would only take turns at it."""
        file = self._file(program)
        kept = None if file is None or not file.exists() else file.read_bytes()
        if file is None or kept is None:
            return functools.partial(self._compile, file, self._lower(program))
        return functools.partial(self._load, file, kept, program)

    def _file(self, program: Program) -> Path | None:
        if self._directory is None:
            return None
        leaves, structure = jax.tree.flatten(program.args)
        made_from = "\n".join((_environment(self._device), program.about, str(structure), *map(str, leaves)))
        return self._directory / hashlib.sha256(made_from.encode()).hexdigest()

    def _lower(self, program: Program) -> Any:
        with jax.default_device(self._device):  # which alone runs it: operations need not be split
            return program.fn.lower(*program.args)

    def _compile(self, file: Path | None, lowered: Any) -> Any:
        program = lowered.compile(compiler_options=COMPILER_OPTIONS.get(self._device.platform))
        if file is not None:
            try:
                kept = pickle.dumps(serialize(program))
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with atomic_write(file) as opened:
                    opened.write(kept)
                _prune(file.parent)
            except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError, OSError) as error:
                log.info("a compiled program could not be kept: %s", error)
        return program

    def _load(self, file: Path, kept: bytes, program: Program) -> Any:
        try:
            loaded = deserialize_and_load(*pickle.loads(kept), execution_devices=[self._device])
            os.utime(file)
        except Exception as error:  # noqa: BLE001 - whatever a damaged file makes of itself
            log.info("the kept program %s cannot be loaded (%s) and is compiled anew", file, error)
            return self._compile(file, self._lower(program))
        return loaded


def _is_private(directory: Path) -> bool:
    """Whether none but this user, or the system's, may write it; one that does not exist yet will be made so."""
    if not directory.exists() or not hasattr(os, "getuid"):
        return True
    status = directory.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def _prune(directory: Path) -> None:
    """Removes what was used longest ago, beyond `KEPT_BYTES`."""
    found = sorted(((file.stat(), file) for file in directory.iterdir()), key=lambda entry: -entry[0].st_mtime)
    total = 0
    for status, file in found:
        total += status.st_size
        if total > KEPT_BYTES:
            file.unlink(missing_ok=True)


@functools.cache
def _environment(device: Any) -> str:
    """What a program depends on besides itself and its arguments."""
    digest = hashlib.sha256()
    sources = Path(tenfold.__file__).parent
    for path in sorted(sources.rglob("*.py")):
        digest.update(f"{path.relative_to(sources)}\n".encode() + path.read_bytes())
    library = native.library()
    if library is not None:
        digest.update(Path(library._name).read_bytes())
    options = {name: value for name, value in jax.config.values.items() if "cache" not in name}
    return "\n".join(
        (
            digest.hexdigest(),
            f"{version('jax')} {version('jaxlib')} {device.platform} {device.device_kind} {device.id}",
            device.client.platform_version,
            f"{len(device.client.devices())} devices, {os.cpu_count()} cores, {xla_flags()}",
            f"{platform.machine()} {_instruction_sets()}",
            repr(sorted(options.items())),
        )
    )


def _instruction_sets() -> str:
    """Of the processor, where the system tells."""
    try:
        found = re.search(r"^(flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:
        return ""
    return found.group() if found else ""
