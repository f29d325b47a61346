"""`tenfold models` as a shell sees it, and the page that it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tenfold.models import FAMILIES

TENFOLD = str(Path(sys.executable).with_name("tenfold"))
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def run(*arguments: str) -> str:
    wide = os.environ | {"COLUMNS": "200"}
    done = subprocess.run([TENFOLD, "models", *arguments], capture_output=True, text=True, env=wide, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_is_what_the_code_says() -> None:
    """Otherwise: tenfold models --markdown > docs/models.md"""
    assert run("--markdown") == PAGE.read_text(encoding="utf-8")


def test_every_architecture_is_in_the_table() -> None:
    shown = run()
    assert [line.split()[1] for line in shown.splitlines() if "CausalLM" in line or "Conditional" in line] == [
        name for name in FAMILIES if name != "GPT2LMHeadModel"
    ]
    assert "GPT2LMHeadModel" in shown
    assert "/v1/chat/completions" in shown


def test_programs_read_the_same() -> None:
    found = {each.pop("architecture"): each for each in json.loads(run("--json"))}
    assert list(found) == list(FAMILIES)
    assert found["Llama4ForCausalLM"] == {
        "caches": ["full", "chunk"],
        "experts": True,
        "formats": ["int8", "int4", "compressed-tensors", "gptq", "awq", "fp8", "mxfp4"],
        "axes": ["expert", "fsdp", "tensor"],
        "endpoints": ["/v1/completions", "/v1/chat/completions"],
    }
