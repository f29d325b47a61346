"""Where a recipe of `tenfold train` runs: here, perhaps as one of several hosts, or on Ray or Kubernetes."""

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer

from tenfold.base import paths
from tenfold.base.errors import START_AGAIN, ConfigError, HostLostError, TenfoldError

_HOSTS = "Many hosts"


class Launcher(StrEnum):
    """What starts the command on several hosts."""

    RAY = "ray"


On = Annotated[Launcher | None, typer.Option("--on", help="Run on the hosts of a Ray cluster.", rich_help_panel=_HOSTS)]
PrintK8s = Annotated[
    bool,
    typer.Option(
        "--print-k8s", help="Print a JobSet for Kubernetes that runs this command, and stop.", rich_help_panel=_HOSTS
    ),
]
Hosts = Annotated[
    int | None, typer.Option(min=1, help="Of Ray all that fit, of Kubernetes one, if left out.", rich_help_panel=_HOSTS)
]
Accelerator = Annotated[str | None, typer.Option(help="Of each host, such as gpu=8 or tpu=4.", rich_help_panel=_HOSTS)]
MaxRestarts = Annotated[
    int,
    typer.Option(
        min=0, help="Of all hosts, from the last checkpoint, when one of them is lost.", rich_help_panel=_HOSTS
    ),
]
Image = Annotated[str, typer.Option(help="Container image, of --print-k8s.", rich_help_panel=_HOSTS)]
Volume = Annotated[
    str | None,
    typer.Option(
        help="Claim of a volume that all hosts write to, and where it is mounted, of --print-k8s, such as "
        "tenfold:/tenfold. Relative paths are on it. Not needed with --checkpoint-dir in an object store.",
        rich_help_panel=_HOSTS,
    ),
]
NodeSelector = Annotated[
    list[str] | None,
    typer.Option(help="Label of nodes, KEY=VALUE, of --print-k8s. May be repeated.", rich_help_panel=_HOSTS),
]


def send(
    context: Any,
    on: On = None,
    print_k8s: PrintK8s = False,
    hosts: Hosts = None,
    accelerator: Accelerator = None,
    max_restarts: MaxRestarts = 3,
    image: Image = "tenfold:latest",
    volume: Volume = None,
    node_selector: NodeSelector = None,
) -> bool:
    """Has the command run elsewhere, or says how, if the options are so; False if it is to run here.

    Args:
        context: typer's, of the command.
        on, print_k8s, hosts, accelerator, max_restarts, image, volume, node_selector: the options.

    Raises:
        ConfigError: the options do not fit each other, or Ray cannot be used.
        TrainingError, HostLostError: as `runtime.ray_gang.run_gang`.
    """
    _refuse_idle_options(context, on, print_k8s=print_k8s)
    if print_k8s:
        from tenfold.runtime.jobset import JobSetConfig, jobset_manifest

        output = PurePosixPath(context.params["output"])
        claim, mount = _parse_volume(volume, output, needed=not _in_store(context.params.get("checkpoint_dir")))
        config = JobSetConfig(
            name=_name(output.name),
            command=("tenfold", "train", *command_line(context)),
            image=image,
            hosts=hosts or 1,
            accelerator=_parse_accelerator(accelerator),
            claim=claim,
            mount=mount,
            node_selector=dict(_parse_label(label) for label in node_selector or ()),
            max_restarts=max_restarts,
        )
        print(jobset_manifest(config), end="")
        return True
    if on is None:
        return False
    from tenfold.runtime.ray_gang import GangConfig, run_gang

    gang = GangConfig(
        arguments=("train", *command_line(context)),
        hosts=hosts,
        accelerator=_parse_accelerator(accelerator),
        max_restarts=max_restarts,
    )
    if not run_gang(gang, lambda text: print(text, file=sys.stderr, flush=True)):
        print("Stopped. The same command goes on from its last checkpoint.")
    return True


def command_line(context: Any) -> list[str]:
    """The recipe's name and the options that were given, without those that say where it runs."""
    arguments = [context.info_name or ""]
    for param in context.command.params:
        if param.name is None or param.name in _SENDING or not _given(context, param.name):
            continue
        value: Any = context.params[param.name]
        if isinstance(value, bool):
            arguments.append((param.opts if value else param.secondary_opts)[0])
        else:
            for item in value if isinstance(value, list | tuple) else (value,):
                arguments += [param.opts[0], str(item)]
    return arguments


_SENDING = frozenset(send.__annotations__) - {"context", "return"}
_OF_KUBERNETES = ("image", "volume", "node_selector")


def _given(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _refuse_idle_options(context: Any, on: Launcher | None, *, print_k8s: bool) -> None:
    """Raises ConfigError if an option was given that another one would have to give a meaning."""
    if on is not None and print_k8s:
        raise ConfigError("--on runs the command and --print-k8s says how another would: give one of them")
    idle = () if print_k8s else _OF_KUBERNETES if on is not None else _SENDING
    for name in sorted(idle):
        if _given(context, name):
            needed = "--print-k8s" if name in _OF_KUBERNETES else "--on ray or --print-k8s"
            raise ConfigError(f"--{name.replace('_', '-')} says how other hosts run the command: add {needed}")


def _parse_accelerator(text: str | None) -> tuple[str, int] | None:
    """The kind and number of "gpu=8"."""
    if text is None:
        return None
    kind, _, count = text.partition("=")
    if kind not in ("gpu", "tpu") or not count.isdecimal() or not int(count):
        raise ConfigError(f"--accelerator takes what each host has, such as gpu=8 or tpu=4, not {text!r}")
    return kind, int(count)


def _parse_volume(text: str | None, output: PurePosixPath, *, needed: bool) -> tuple[str | None, str]:
    """The claim and the path of "tenfold:/tenfold"; without a text, such that the output is there."""
    if text is None:
        return "tenfold" if needed else None, str(output.parent) if output.is_absolute() else "/tenfold"
    claim, _, mount = text.partition(":")
    if not claim or not mount.startswith("/"):
        raise ConfigError(f"--volume takes a claim and an absolute path, such as tenfold:/tenfold, not {text!r}")
    if not PurePosixPath(mount, output).is_relative_to(mount):
        raise ConfigError(
            f"what the run writes to {output} would be lost with its hosts: name an output on the volume at {mount}, "
            "or mount one there"
        )
    return claim, mount


def _parse_label(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise ConfigError(f"--node-selector takes KEY=VALUE, not {text!r}")
    return key, value


def _name(text: str) -> str:
    """A name for Kubernetes, as near to a text as its rules allow: a label of RFC 1035, with room for numbers."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-")
    return label if label[:1].isalpha() else f"run-{label}".strip("-")


@contextmanager
def as_one() -> Iterator[None]:
    """Around a recipe: as one of the hosts that the environment names, if it names any.

    If one of several fails, the process ends here: at an ordinary end jax would wait for the others, which wait for it.
    """
    from tenfold.parallel.hosts import joined_hosts

    found = paths.cluster()
    try:
        with joined_hosts():
            yield
    except typer.Exit:
        raise
    except Exception as error:
        if found is None or found[1] == 1:
            raise
        if isinstance(error, TenfoldError):
            print(f"tenfold: {error}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(START_AGAIN if isinstance(error, HostLostError) else 1)


@contextmanager
def output_kept(output: Path, checkpoint_dir: str | None) -> Iterator[None]:
    """Around a recipe: what it wrote is copied beside its checkpoints when it ends or is stopped, if those are in an
    object store, since then no disk need outlive the hosts.

    Raises:
        CheckpointError: the store cannot be written.
    """
    try:
        yield
    except typer.Exit:  # of a run that is not done
        _keep(output, checkpoint_dir)
        raise
    _keep(output, checkpoint_dir)


def _keep(output: Path, checkpoint_dir: str | None) -> None:
    found = paths.cluster()
    if checkpoint_dir is None or not _in_store(checkpoint_dir) or (found is not None and found[2] > 0):
        return
    from tenfold.base.storage import put_files

    kept = f"{checkpoint_dir.rstrip('/')}/output"
    put_files(output, kept)
    print(f"What is in {output} is also in {kept}.")


def _in_store(checkpoint_dir: str | None) -> bool:
    from tenfold.base.storage import OBJECT_STORES

    return checkpoint_dir is not None and checkpoint_dir.partition("://")[0] in OBJECT_STORES
