"""A command of `tenfold` on the hosts of a Ray cluster: a gang of one actor on each, which start and end together.

The actors run the command as processes that join by `jax.distributed`. When a host is lost, the others are ended, and
all are started again, a bounded number of times; that a command goes on from its last checkpoint is its own affair.
"""

import importlib
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from tenfold.base import paths
from tenfold.base.errors import START_AGAIN, ConfigError, HostLostError, TrainingError
from tenfold.train.signals import told_to_stop

PLACEMENT_TIMEOUT_S = 600.0  # for Ray to find hosts, such as in place of one that was lost
GRACE_S = 10.0  # after a host is lost, for the others to say what they know of it
_POLL_S = 0.5
_LINES = 20  # of a failed host's output that are shown
_STOPPED = (0, START_AGAIN, -signal.SIGTERM)  # statuses of a command that was told to
_ITS_OWN = (1, 2)  # statuses of a command that failed by its own account, and would do so again

Report = Callable[[str], None]
"""Shows a line to whoever started the gang."""


@dataclass(frozen=True, kw_only=True)
class GangConfig:
    """What runs, and on what.

    Attributes:
        arguments: of `tenfold`.
        hosts: how many; None takes all that have the accelerators.
        accelerator: "gpu" or "tpu", and how many each host has; None takes the most that any has.
        max_restarts: of all hosts together, when one is lost.
    """

    arguments: tuple[str, ...]
    hosts: int | None = None
    accelerator: tuple[str, int] | None = None
    max_restarts: int = 3


class Ended(NamedTuple):
    """How a host's command ended.

    Attributes:
        status: its exit status, negative for a signal; None if the actor is gone.
        tail: the last lines of its output, or what Ray says of the actor.
    """

    status: int | None
    tail: str


def run_gang(config: GangConfig, report: Report) -> bool:
    """Runs the command on all hosts until it has ended on them; False if it was told to stop before, and did.

    Connects to the cluster that `RAY_ADDRESS` names, or to one that runs on this machine, or starts one. All hosts need
    this environment, and this directory under the same path. SIGTERM and SIGINT are passed on to all commands, which
    end with a checkpoint; a second SIGINT kills them.

    Raises:
        ConfigError: Ray is not installed, or has no such hosts.
        TrainingError: the command failed by its own account; has the last lines that it wrote.
        HostLostError: hosts were lost more than `max_restarts` times; so, too.
    """
    ray = _import_ray()
    connected = ray.is_initialized()
    if not connected:
        ray.init(logging_level="WARNING")
    try:
        with told_to_stop() as stop:
            return _run(ray, config, stop, report)
    finally:
        if not connected:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError("running on Ray needs an extra package: pip install 'tenfold[ray]'") from None


def _run(ray: Any, config: GangConfig, stop: Event, report: Report) -> bool:
    for restart in range(config.max_restarts + 1):
        ended = _run_once(ray, config, stop, report)
        if all(end.status == 0 for end in ended):
            return bool(ended)
        if stop.is_set() and all(end.status in _STOPPED for end in ended):
            return False
        host, first = _culprit(ended)
        said = f"host {host} of {len(ended)} {_describe(first.status)}. Its last lines:\n{first.tail}"
        if first.status in _ITS_OWN:
            raise TrainingError(said)
        if stop.is_set() or restart == config.max_restarts:
            raise HostLostError(f"{said}\nThe gang was started again {restart} times, and ends")
        report(
            f"{said}\nAll are started again, from the last checkpoint ({restart + 1} of {config.max_restarts} times)"
        )
    raise AssertionError("the last time raises")


def _culprit(ended: Sequence[Ended]) -> tuple[int, Ended]:
    """The host that most likely failed first: others end with `START_AGAIN`, or are aborted by jax, on its account."""

    def blame(numbered: tuple[int, Ended]) -> int:
        status = numbered[1].status
        order = (*_ITS_OWN, None, -signal.SIGKILL)
        late = (-signal.SIGABRT, START_AGAIN, 0)
        return order.index(status) if status in order else 10 + (late.index(status) if status in late else -1)

    return min(enumerate(ended), key=blame)


def _describe(status: int | None) -> str:
    if status is None:
        return "is lost"
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


# --- one life of the gang -------------------------------------------------------------------------------------------


def _run_once(ray: Any, config: GangConfig, stop: Event, report: Report) -> list[Ended]:
    """How the command ended on each host; nothing if it was told to stop before it began."""
    placement_group = importlib.import_module("ray.util.placement_group")
    bundle, hosts = _choose_hosts(ray.nodes(), config)
    group = placement_group.placement_group([bundle] * hosts, strategy="STRICT_SPREAD")
    actors: list[Any] = []
    try:
        if not _wait_for_hosts(group, bundle, hosts, stop, report):
            return []
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        resources = {name: count for name, count in bundle.items() if name not in ("CPU", "GPU")}
        host = ray.remote(_Host)
        for index in range(hosts):
            strategy = strategies.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            options = {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0), "resources": resources}
            # One thread runs the command, and one stops it.
            actors.append(host.options(**options, scheduling_strategy=strategy, max_concurrency=2).remote(index))
        return _watch(ray, actors, config.arguments, stop)
    finally:
        for actor in actors:
            ray.kill(actor)
        placement_group.remove_placement_group(group)


def _choose_hosts(nodes: Sequence[Mapping[str, Any]], config: GangConfig) -> tuple[dict[str, float], int]:
    """What the gang takes of each host, and of how many."""
    living = [node["Resources"] for node in nodes if node["Alive"]]
    if config.accelerator is not None:
        kind, count = config.accelerator
        accelerators = {kind.upper(): float(count)}
    else:
        most = {kind: max((found.get(kind, 0.0) for found in living), default=0.0) for kind in ("TPU", "GPU")}
        accelerators = {kind: count for kind, count in most.items() if count}
    bundle = {"CPU": 1.0, **accelerators}
    fitting = sum(all(found.get(name, 0.0) >= count for name, count in bundle.items()) for found in living)
    if not (config.hosts or fitting):
        raise ConfigError(f"none of Ray's {len(living)} hosts has {bundle}: name what they have by --accelerator")
    return bundle, config.hosts or fitting


def _wait_for_hosts(group: Any, bundle: Mapping[str, float], hosts: int, stop: Event, report: Report) -> bool:
    """True once Ray has found the hosts; False if told to stop."""
    deadline = time.monotonic() + PLACEMENT_TIMEOUT_S
    waited = False
    while not group.wait(timeout_seconds=5):
        if stop.is_set():
            return False
        if time.monotonic() > deadline:
            raise ConfigError(
                f"Ray has not found {hosts} hosts with {dict(bundle)} free in {PLACEMENT_TIMEOUT_S:.0f} s"
            )
        if not waited:
            report(f"Waiting for Ray to find {hosts} hosts with {dict(bundle)} free")
        waited = True
    return True


def _watch(ray: Any, actors: Sequence[Any], arguments: Sequence[str], stop: Event) -> list[Ended]:
    """Runs the command on all hosts, until it has ended on all, or a while after it failed on one."""
    lost: Any = importlib.import_module("ray.exceptions").RayError
    ended = [Ended(None, "")] * len(actors)
    try:
        coordinator = ray.get(actors[0].free_address.remote())
    except lost as error:
        return [Ended(None, str(error)), *ended[1:]]
    directory = str(Path.cwd())
    running = {
        actor.run.remote(arguments, directory, coordinator, len(actors)): index for index, actor in enumerate(actors)
    }
    deadline, told = float("inf"), False
    while running and time.monotonic() < deadline:
        if stop.is_set() and not told:
            told = True
            for actor in actors:
                actor.stop.remote()
        for done in ray.wait(list(running), timeout=_POLL_S)[0]:
            index = running.pop(done)
            try:
                ended[index] = Ended(*ray.get(done))
            except lost as error:
                ended[index] = Ended(None, str(error))
            if ended[index].status != 0 and not (told and ended[index].status in _STOPPED):
                deadline = min(deadline, time.monotonic() + GRACE_S)
    for index in running.values():
        ended[index] = Ended(START_AGAIN, "")  # it is ended for the sake of another
    return ended


class _Host:
    """The actor of one host: runs the command as a process, which ends with it."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._process: subprocess.Popen[str] | None = None
        self._told = False

    def __repr__(self) -> str:  # what Ray writes before its lines
        return f"host {self._index}"

    def free_address(self) -> str:
        """Where the processes may meet."""
        address = importlib.import_module("ray.util").get_node_ip_address()
        with socket.socket() as free:
            free.bind(("", 0))
            return f"{address}:{free.getsockname()[1]}"

    def run(self, arguments: Sequence[str], directory: str, coordinator: str, count: int) -> tuple[int, str]:
        """The exit status of the command, and its last lines, all of which are passed on."""
        command = (sys.executable, "-P", "-u", "-m", "tenfold.runtime.leash", "tenfold.cli.main", *arguments)
        tail: deque[str] = deque(maxlen=_LINES)
        with subprocess.Popen(
            command,
            cwd=directory,
            env=paths.in_cluster(coordinator, count, self._index),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            self._process = process
            if self._told:
                process.terminate()
            for line in process.stdout or ():
                tail.append(line)
                print(line, end="", flush=True)  # noqa: T201 -- which Ray shows where the gang was started
            status = process.wait()
        return status, "".join(tail)

    def stop(self) -> None:
        """Tells the command to end."""
        self._told = True
        if self._process is not None:
            self._process.terminate()
