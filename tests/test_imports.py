"""What importing a package loads, seen from fresh processes: static checks do not see dynamic imports."""

import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
WEB = ("fastapi", "starlette", "uvicorn", "pydantic")
HEAVY_OPTIONALS = ("transformers", "optax", "obstore", "matplotlib", "ray")

# Imports the modules named in argv[2:] one by one; fails on the first that brings in one of those named in argv[1].
PROBE = """
import importlib, sys
banned = sys.argv[1].split(",")
for name in sys.argv[2:]:
    importlib.import_module(name)
    loaded = sorted(set(banned) & set(sys.modules))
    if loaded:
        sys.exit(f"importing {name} loads {', '.join(loaded)}")
"""


def modules_of(name: str) -> list[str]:
    """The module itself, and everything below it where it is a package."""
    folder = SOURCE.joinpath(*name.split("."))
    if not folder.is_dir():
        return [name]
    parts = (path.relative_to(SOURCE).with_suffix("").parts for path in sorted(folder.rglob("*.py")))
    return [".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts]


def contract(identifier: str) -> list[str]:
    """The source modules of an import-linter contract."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    return next(c["source_modules"] for c in contracts if c["id"] == identifier)


def import_fresh(modules: list[str], banned: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, ",".join(banned), *modules], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr.strip()


@pytest.mark.parametrize("modules", [["tenfold"], ["tenfold.cli.main"]], ids=str)
def test_entry_points_load_no_jax(modules):
    import_fresh(modules, ("jax", "jaxlib", *HEAVY_OPTIONALS))


def test_control_tower_loads_no_jax():
    import_fresh(
        [module for name in contract("control-tower") for module in modules_of(name)],
        ("jax", "jaxlib", *HEAVY_OPTIONALS),
    )


def test_compute_tower_loads_no_web_framework():
    import_fresh([module for name in contract("compute-tower") for module in modules_of(name)], WEB)


def test_help_is_quick():
    """In seconds of CPU, because other tests share the cores; the process does nothing but compute."""
    tenfold = Path(sys.executable).with_name("tenfold")
    taken = []
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = subprocess.run([tenfold, "--help"], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if taken[-1] <= 0.5:
            break
    assert "serve" in shown
    assert min(taken) <= 0.5, f"tenfold --help takes {min(taken):.2f} s"
