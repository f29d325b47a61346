"""A run of training on several hosts of Kubernetes, as a JobSet (https://jobset.sigs.k8s.io), which starts them
together and, when one fails, again together."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from tenfold.base.paths import COORDINATOR, PROCESS, PROCESSES

_HOST = "host"
_PORT = 8476  # any that the hosts' other programs leave free
_GRACE_S = 300  # to write a checkpoint, when Kubernetes takes a host away
_RESOURCES = {"gpu": "nvidia.com/gpu", "tpu": "google.com/tpu"}
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclass(frozen=True, kw_only=True)
class JobSetConfig:
    """What runs, and on what.

    Attributes:
        name: of the JobSet; a label of RFC 1035, of at most 40 characters.
        command: the program and its arguments, the same on all hosts.
        image: of the containers.
        hosts: how many.
        accelerator: "gpu" or "tpu", and how many each host has.
        claim: name of a PersistentVolumeClaim that all hosts may write to; None gives each an empty directory, which is
            lost with it.
        mount: where that is mounted; the command runs there.
        node_selector: labels of the nodes that hosts may be.
        max_restarts: of all hosts together, when one has failed.
    """

    name: str
    command: tuple[str, ...]
    image: str
    hosts: int = 1
    accelerator: tuple[str, int] | None = None
    claim: str | None = "tenfold"
    mount: str = "/tenfold"
    node_selector: Mapping[str, str] = field(default_factory=dict[str, str])
    max_restarts: int = 3


def jobset_manifest(config: JobSetConfig) -> str:
    """The JobSet as YAML, for `kubectl apply`."""
    about = (_NO_VOLUME if config.claim is None else _VOLUME).format(claim=config.claim, mount=config.mount)
    return (
        _ABOUT.format(image=config.image)
        + about
        + yaml.dump(jobset(config), Dumper=_Dumper, sort_keys=False, width=2**16, allow_unicode=True)
    )


_ABOUT = """\
# For a cluster with the JobSet controller. The image {image} has to hold tenfold[train], and further:
"""
_VOLUME = """\
# the claim {claim} has to be of a volume that all hosts may write to (ReadWriteMany): at {mount} are the
# checkpoints, and what relative paths name.
"""
_NO_VOLUME = """\
# tenfold[cloud]. Each host has an empty directory at {mount}, which is lost with it: name models and data by ids, URIs
# or paths in the image. The hosts need the credentials of the object store, such as by their service account.
"""


def jobset(config: JobSetConfig) -> dict[str, Any]:
    """The JobSet, in the fields of its API v1alpha2."""
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": config.name},
        "spec": {
            # A headless service, so that hosts have names: <jobset>-<replicated job>-<job>-<pod>.<jobset>.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": config.max_restarts,
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": _HOST, "replicas": 1, "template": {"spec": _job(config)}}],
        },
    }


def _job(config: JobSetConfig) -> dict[str, Any]:
    """A pod for each host. A command that fails by its own account (status 1 or 2) would do so again."""
    its_own = {"containerName": _HOST, "operator": "In", "values": [1, 2]}
    return {
        "parallelism": config.hosts,
        "completions": config.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": its_own}]},
        "template": {"spec": _pod(config)},
    }


def _pod(config: JobSetConfig) -> dict[str, Any]:
    runs: dict[str, Any] = (
        {"emptyDir": {}} if config.claim is None else {"persistentVolumeClaim": {"claimName": config.claim}}
    )
    volumes: list[dict[str, Any]] = [{"name": "runs", **runs}]
    mounts = [{"name": "runs", "mountPath": config.mount}]
    resources: dict[str, Any] = {}
    if config.accelerator is not None:
        kind, count = config.accelerator
        resources = {"resources": {"limits": {_RESOURCES[kind]: count}}}
        if kind == "gpu":  # NCCL needs more shared memory than the 64 MB that containers have
            volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
            mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    container = {
        "name": _HOST,
        "image": config.image,
        "command": [text.replace("$", "$$") for text in config.command],  # Kubernetes expands $(NAME)
        "workingDir": config.mount,
        "env": [
            {"name": COORDINATOR, "value": f"{config.name}-{_HOST}-0-0.{config.name}:{_PORT}"},
            {"name": PROCESSES, "value": str(config.hosts)},
            {"name": PROCESS, "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}},
        ],
        "ports": [{"containerPort": _PORT}],
        **resources,
        "volumeMounts": mounts,
    }
    selector = {"nodeSelector": dict(config.node_selector)} if config.node_selector else {}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_S,
        **selector,
        "containers": [container],
        "volumes": volumes,
    }


class _Dumper(yaml.SafeDumper):
    """Quotes all texts but plain words: what is one to YAML 1.1 may be a number to Kubernetes, such as 1e-4."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = None if re.fullmatch(r"[A-Za-z][A-Za-z0-9./_-]*", text) else '"'
        return yaml.ScalarNode("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
