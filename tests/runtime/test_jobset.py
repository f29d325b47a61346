"""The JobSet is what Kubernetes reads it as, checked with the names that its API has."""

from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold.runtime.jobset import JobSetConfig, jobset_manifest

# The fields of JobSet v1alpha2 (api/jobset/v1alpha2/jobset_types.go), and of batch/v1 and core/v1 below it.
FIELDS = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {
        *("replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend", "coordinator"),
        *("managedBy", "ttlSecondsAfterFinished", "volumeClaimPolicies"),
    },
    "network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
    "failurePolicy": {"maxRestarts", "restartStrategy", "rules"},
    "replicatedJobs": {"name", "groupName", "template", "replicas", "dependsOn"},
    "job": {
        *("parallelism", "completions", "activeDeadlineSeconds", "podFailurePolicy", "successPolicy", "backoffLimit"),
        *("backoffLimitPerIndex", "maxFailedIndexes", "selector", "manualSelector", "template", "completionMode"),
        *("ttlSecondsAfterFinished", "suspend", "podReplacementPolicy", "managedBy"),
    },
    "container": {"name", "image", "command", "workingDir", "env", "ports", "resources", "volumeMounts"},
}


def read(config: JobSetConfig) -> dict[str, Any]:
    return yaml.safe_load(jobset_manifest(config))


def parts(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The job, its pod and the pod's container."""
    (replicated,) = found["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


def test_the_hosts_find_each_other_and_start_again_together() -> None:
    config = JobSetConfig(name="first", command=("tenfold", "train"), image="registry/tenfold:1", hosts=4)
    found = read(config)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job, pod, container = parts(found)
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert found["spec"]["network"]["enableDNSHostnames"] is True
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 3
    name, replicated = found["metadata"]["name"], found["spec"]["replicatedJobs"][0]["name"]
    env = {variable["name"]: variable for variable in container["env"]}
    # <jobset>-<replicated job>-<index of the job>-<index of the pod>.<subdomain, which is the jobset's name>
    host, _, port = env["JAX_COORDINATOR_ADDRESS"]["value"].partition(":")
    assert host == f"{name}-{replicated}-0-0.{name}" and {"containerPort": int(port)} in container["ports"]
    assert env["JAX_NUM_PROCESSES"]["value"] == "4"
    index = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert found["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_its_fields_are_those_of_the_api() -> None:
    found = read(JobSetConfig(name="first", command=("tenfold",), image="i", accelerator=("gpu", 8)))
    job, _, container = parts(found)
    for names, part in (
        ("", found),
        ("spec", found["spec"]),
        ("network", found["spec"]["network"]),
        ("failurePolicy", found["spec"]["failurePolicy"]),
        ("replicatedJobs", found["spec"]["replicatedJobs"][0]),
        ("job", job),
        ("container", container),
    ):
        assert part.keys() <= FIELDS[names], names


def test_accelerators_nodes_and_the_volume() -> None:
    label = {"cloud.google.com/gke-tpu-topology": "4x4", "number": "3"}
    config = JobSetConfig(
        name="a", command=("tenfold",), image="i", accelerator=("tpu", 4), node_selector=label, claim="c", mount="/m"
    )
    _, pod, container = parts(read(config))
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert pod["nodeSelector"] == label
    assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "c"}}]
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/m"}] and container["workingDir"] == "/m"
    _, pod, container = parts(read(JobSetConfig(name="a", command=("tenfold",), image="i", accelerator=("gpu", 8))))
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert "resources" not in parts(read(JobSetConfig(name="a", command=("tenfold",), image="i")))[2]


def expand(text: str) -> str:
    """What Kubernetes makes of an argument of a command, where no variable is defined but HOME.

    After its documentation: $(NAME) is replaced if NAME is defined, and $$ is a $ that begins nothing.
    """
    made, at = "", 0
    while at < len(text):
        if text[at] == "$" and text[at + 1 : at + 2] == "$":
            made, at = made + "$", at + 2
        elif text[at:].startswith("$(HOME)"):
            made, at = made + "/root", at + len("$(HOME)")
        else:
            made, at = made + text[at], at + 1
    return made


@settings(max_examples=30)
@given(st.lists(st.one_of(st.text(), st.sampled_from(["$(HOME)", "$$(HOME)", "1e-4", "on", "~", "0x1F", "- a: b"]))))
def test_the_command_is_the_one_that_was_given(arguments: list[str]) -> None:
    arguments = [text.encode("utf-8", "ignore").decode() for text in arguments]
    config = JobSetConfig(name="a", command=("tenfold", *arguments), image="i")
    assert [expand(text) for text in parts(read(config))[2]["command"]] == ["tenfold", *arguments]


def test_numbers_stay_texts_to_other_readers_of_yaml() -> None:
    """YAML 1.2 reads 1e-4 and 0o7 as numbers, and Kubernetes refuses an argument that is one."""
    config = JobSetConfig(name="a", command=("tenfold", "1e-4", "0o7", ".5", "12", "-3"), image="i")
    shown = jobset_manifest(config)
    for text in config.command[1:]:
        assert f'- "{text}"\n' in shown
