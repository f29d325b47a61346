"""The documents, the tables and the public surface say what the code is."""

import ast
import re
from pathlib import Path

import pytest
import typer.core
import typer.main

from tenfold.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "tenfold"

PUBLIC_NAMES = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]
TRAINING_FLAGS = (
    *("--max-steps", "--optim", "--learning-rate", "--lr-scheduler-type", "--warmup-steps", "--decay-steps"),
    *("--min-lr-ratio", "--weight-decay", "--adam-beta1", "--adam-beta2", "--max-grad-norm"),
    *(
        "--gradient-accumulation-steps",
        "--dtype",
        "--fp8",
        "--mesh",
        "--remat",
        "--unroll-layers",
        "--pipeline-schedule",
        "--pipeline-stages",
    ),
    *("--offload-optimizer", "--save-steps", "--save-total-limit", "--metric-for-best-model"),
    *("--checkpoint-dir", "--eval-steps", "--on-bad-step", "--loss-spike", "--report-to", "--profile"),
    *("--on", "--print-k8s", "--hosts", "--accelerator", "--max-restarts", "--image", "--volume", "--node-selector"),
)
TUNING_FLAGS = (
    *("--output", "--dataset", "--split", "--model", "--max-length", "--batch-size", "--seed"),
    *("--lora", "--lora-r", "--lora-alpha", "--lora-target-modules", "--use-dora", "--use-rslora", "--lora-dropout"),
    "--quantization",
    *TRAINING_FLAGS,
)
FLAGS = {
    "tenfold": {"--version"},
    "tenfold doctor": {"--timeout"},
    "tenfold models": {"--json", "--markdown"},
    "tenfold quantize": {"--output", "--scheme", "--calibration", "--samples", "--seed"},
    "tenfold serve": {
        *("--served-model-name", "--tokenizer", "--revision", "--chat-template", "--generation-config"),
        *("--host", "--port", "--api-key", "--root-path", "--ssl-keyfile", "--ssl-certfile", "--max-request-bytes"),
        *("--shutdown-timeout", "--disable-uvicorn-access-log", "--uvicorn-log-level", "--log-level"),
        *(
            "--dtype",
            "--quantization",
            "--kv-cache-dtype",
            "--max-model-len",
            "--max-num-seqs",
            "--max-num-batched-tokens",
            "--block-size",
        ),
        *("--kv-cache-memory-bytes", "--gpu-memory-utilization", "--max-waiting", "--seed"),
        *("--enable-prefix-caching", "--no-enable-prefix-caching"),
    },
    "tenfold train": set(),
    "tenfold train pretrain": {
        *("--output", "--dataset", "--model", "--from-scratch", "--dataset-weight", "--split", "--validation"),
        *("--text-column", "--max-length", "--batch-size", "--seed", "--plan"),
        *TRAINING_FLAGS,
    },
    "tenfold train evaluate": {
        *("--dataset", "--model", "--split", "--text-column", "--max-length", "--batch-size", "--eval-batches"),
        "--dtype",
    },
    "tenfold train sft": {*TUNING_FLAGS, "--dataset-weight", "--validation", "--format"},
    "tenfold train dpo": {*TUNING_FLAGS, "--format", "--loss-type", "--beta", "--label-smoothing"},
    "tenfold train distill": {
        *TUNING_FLAGS,
        *("--dataset-weight", "--format", "--teacher", "--divergence", "--temperature", "--alpha"),
    },
    "tenfold train embed": {*TUNING_FLAGS, "--negatives", "--pooling", "--temperature", "--chunk"},
    "tenfold merge": {"--output"},
    "tenfold train pico": {"--output", "--seed"},
}


def architecture_rows() -> list[tuple[str, str, str]]:
    """Folder, sentence and entry symbol of each row of the packages' table."""
    section = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("\n## Packages\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:3] == "| `"]
    return [(folder.strip("`"), sentence, symbol.strip("`")) for folder, sentence, symbol in rows]


def package_folders() -> list[Path]:
    """The folders directly below `tenfold` that hold code."""
    return sorted(folder for folder in PACKAGE.iterdir() if folder.is_dir() and any(folder.glob("*.py")))


def docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def defined_names(path: Path) -> set[str]:
    """The functions, classes and constants that a module defines at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_every_package_is_in_the_table():
    assert sorted(folder for folder, _, _ in architecture_rows()) == [folder.name for folder in package_folders()]


@pytest.mark.parametrize(("folder", "sentence", "symbol"), architecture_rows())
def test_table_row_repeats_the_package(folder, sentence, symbol):
    assert sentence == (docstring(PACKAGE / folder / "__init__.py") or "").partition("\n")[0]
    module, _, name = symbol.rpartition(".")
    assert name in defined_names(PACKAGE.joinpath(folder, *module.split(".")).with_suffix(".py")), symbol


def test_every_folder_with_code_is_a_documented_package():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not docstring(folder / "__init__.py")] == []


def test_table_of_families_is_the_files():
    from tenfold.models import FAMILIES

    files = {path.stem for path in (PACKAGE / "models").glob("*.py")} - {"__init__", "capabilities", "family"}
    assert set(FAMILIES.values()) == files


def test_annotations_stay_real():
    """jaxtyping, pydantic and msgspec read annotations at run time."""
    folders = ("src", "tests", "bench", "tools", "examples")
    postponed = [
        str(path.relative_to(ROOT))
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^from __future__ import .*\bannotations\b", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert postponed == []


def test_documented_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    documents = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        target
        for path in documents
        for target in re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"run", "test"} <= named
    assert named <= targets
    header = set(re.findall(r"^#   make ([a-z]+) ", makefile, re.MULTILINE))
    assert header <= targets


def test_documented_files_exist():
    documents = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *(ROOT / "docs").rglob("*.md")]
    missing = [
        f"{document.name}: {link}"
        for document in documents
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8"))
        if not (document.parent / link).exists()
    ]
    assert missing == []


def test_nothing_names_an_index_or_a_machine():
    """Pins hold for every index; what is written here must not depend on where it was written."""
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in pins if not re.fullmatch(r"[a-z0-9-]+==[0-9][^ ]*( ; .+)?", line)] == []


def test_public_names():
    import tenfold

    assert sorted(tenfold.__all__) == sorted(PUBLIC_NAMES)
    for name in PUBLIC_NAMES:
        assert getattr(tenfold, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tenfold.no_such_name


def flags(command: typer.core.TyperGroup | typer.core.TyperCommand, name: str = "tenfold") -> dict[str, set[str]]:
    """The long options of every command, by the command's full name."""
    found = {name: {option for param in command.params for option in (*param.opts, *param.secondary_opts)}}
    for child_name, child in getattr(command, "commands", {}).items():
        found |= flags(child, f"{name} {child_name}")
    return {key: {option for option in options if option.startswith("--")} for key, options in found.items()}


def test_command_line():
    """A flag once published is there for good, so that adding or removing one is a change of this list too."""
    assert flags(typer.main.get_command(app)) == FLAGS


def test_readme_names_real_flags():
    named = set(re.findall(r"`(--[a-z0-9-]+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert "--max-model-len" in named
    assert named <= set().union(*FLAGS.values())
