"""Where a recipe runs, as the command line says it."""

from itertools import pairwise
from typing import Any

import pytest
import yaml

from tenfold.base.errors import ConfigError
from tenfold.cli.main import app


def manifest(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    app(["train", *arguments, "--print-k8s"], standalone_mode=False)
    return yaml.safe_load(capsys.readouterr().out)


def container(found: dict[str, Any]) -> dict[str, Any]:
    (made,) = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    return made


PRETRAIN = ["pretrain", "--model", "m", "--dataset", "a b.txt", "--dataset", "$(HOME)/c", "--output", "runs/Run_1"]


def test_the_command_is_printed_without_where_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    given = [*PRETRAIN, "--optim", "muon", "--learning-rate", "1e-4", "--from-scratch", "--max-length", "4K"]
    found = manifest(capsys, *given, "--hosts", "2", "--image", "i:1", "--accelerator", "gpu=8", "--max-restarts", "7")
    made = container(found)
    assert found["metadata"]["name"] == "run-1"
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert (made["image"], made["resources"]["limits"]) == ("i:1", {"nvidia.com/gpu": 8})
    command = [text.replace("$$", "$") for text in made["command"]]
    assert command[:3] == ["tenfold", "train", "pretrain"]
    pairs = [("--optim", "muon"), ("--learning-rate", "0.0001"), ("--dataset", "a b.txt"), ("--dataset", "$(HOME)/c")]
    for name, value in [*pairs, ("--max-length", "4K"), ("--output", "runs/Run_1"), ("--model", "m")]:
        assert (name, value) in pairwise(command)
    assert command.count("--from-scratch") == 1 and len(command) == 3 + 2 * 7 + 1
    # The same command, given again, is the same.
    again = container(manifest(capsys, *command[2:]))["command"]
    assert again == made["command"]


@pytest.mark.parametrize("recipe", ["sft", "dpo", "embed"])
def test_every_recipe_has_a_manifest(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [recipe, "--output", "/shared/runs/a", "--dataset", "d.jsonl", "--lora", "-o", "/shared/runs/b"]
    found = manifest(capsys, *given, "--node-selector", "disk=fast")
    made = container(found)
    assert made["command"] == [
        "tenfold",
        "train",
        recipe,
        *("--output", "/shared/runs/b", "--dataset", "d.jsonl", "--lora"),
    ]
    assert made["workingDir"] == "/shared/runs"  # so that what the run writes stays
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"disk": "fast"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hosts", "2"], "--hosts says how other hosts run the command: add --on ray or --print-k8s"),
        (["--image", "i"], "--image says how other hosts run the command: add --print-k8s"),
        (["--on", "ray", "--image", "i"], "--image .* add --print-k8s"),
        (["--on", "ray", "--print-k8s"], "give one of them"),
        (["--print-k8s", "--accelerator", "cpu=2"], "gpu=8 or tpu=4, not 'cpu=2'"),
        (["--print-k8s", "--accelerator", "gpu"], "gpu=8 or tpu=4, not 'gpu'"),
        (["--print-k8s", "--node-selector", "disk"], "KEY=VALUE, not 'disk'"),
        (["--print-k8s", "--volume", "claim"], "a claim and an absolute path, such as tenfold:/tenfold, not 'claim'"),
        (["--print-k8s", "--volume", "c:/data", "--output", "/runs/a"], "what the run writes to /runs/a would be lost"),
    ],
)
def test_options_that_do_not_fit_are_refused(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        app(["train", *PRETRAIN, *more], standalone_mode=False)


@pytest.mark.parametrize(
    ("more", "runs"),
    [
        ([], {"persistentVolumeClaim": {"claimName": "tenfold"}}),
        (["--checkpoint-dir", "gs://bucket/run"], {"emptyDir": {}}),
        (["--checkpoint-dir", "gs://bucket/run", "--volume", "c:/d"], {"persistentVolumeClaim": {"claimName": "c"}}),
        (["--checkpoint-dir", "/elsewhere"], {"persistentVolumeClaim": {"claimName": "tenfold"}}),
    ],
)
def test_hosts_need_a_volume_unless_checkpoints_are_in_a_store(
    more: list[str], runs: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    app(["train", *PRETRAIN, *more, "--print-k8s"], standalone_mode=False)
    found = yaml.safe_load(said := capsys.readouterr().out)
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["volumes"][0] == {"name": "runs", **runs}
    assert ("# tenfold[cloud]." in said) == ("emptyDir" in runs)
