"""Hold files, functions and packages to their size budgets, and print how large every package is.

A file's and a package's size is its lines; a function's is its lines without its docstring, so that documenting it
costs nothing. The budgets are a reviewed list and not a wall: what must be larger stands in `REVIEWED` with the size
that was agreed and the reason, and leaves the table when it shrinks again.

Run as `python tools/sizes.py`. Exits with 1 when something is over its budget or an entry is not needed.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_BUDGET = 500
KERNEL_FILE_BUDGET = 900
FUNCTION_BUDGET = 60
PACKAGE_BUDGET = 4000

SOURCE_DIRS = ("src", "tools", "bench", "examples")
PACKAGES_DIR = Path("src/tenfold")


@dataclass(frozen=True)
class Exemption:
    """A size above the budget that was reviewed and accepted.

    Attributes:
        lines: the most that it may have.
        reason: why splitting it would make it worse.
    """

    lines: int
    reason: str


REVIEWED = {
    "src/tenfold/cli/serve.py::serve": Exemption(72, "one line per option, and each is passed on once"),
    "src/tenfold/models": Exemption(8000, "one self-contained file for each family, by design"),
    "src/tenfold/train": Exemption(5000, "the trainer, its recipes, and the making of the built-in model"),
    "src/tenfold/nn": Exemption(5200, "layers of every kind of model, and reading every kind of checkpoint"),
}
"""Exemptions by name: `path`, `path::function`, `path::Class.method`, or a package's directory."""


@dataclass(frozen=True)
class Measured:
    """The size of one named thing and the budget that holds for it, both in lines."""

    name: str
    lines: int
    budget: int


def measure(root: Path) -> Iterator[Measured]:
    """Yield every file, function and package below `root` with its size."""
    packages: Counter[str] = Counter()
    for source_dir in SOURCE_DIRS:
        for path in sorted((root / source_dir).rglob("*.py")):
            relative = path.relative_to(root)
            text = path.read_text(encoding="utf-8")
            lines = len(text.splitlines())
            in_kernels = relative.is_relative_to(PACKAGES_DIR / "kernels")
            yield Measured(relative.as_posix(), lines, KERNEL_FILE_BUDGET if in_kernels else FILE_BUDGET)
            for name, function_lines in functions(ast.parse(text, filename=str(path))):
                yield Measured(f"{relative.as_posix()}::{name}", function_lines, FUNCTION_BUDGET)
            if relative.is_relative_to(PACKAGES_DIR):
                packages[relative.relative_to(PACKAGES_DIR).parts[0]] += lines
    for package, lines in sorted(packages.items()):
        if not package.endswith(".py"):
            yield Measured((PACKAGES_DIR / package).as_posix(), lines, PACKAGE_BUDGET)


def functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Yield each function below `node` as its dotted name and its lines from `def` to the end, docstring excluded."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{child.name}"
            yield name, _span(child) - (_span(child.body[0]) if ast.get_docstring(child) else 0)
            yield from functions(child, f"{name}.")
        elif isinstance(child, ast.ClassDef):
            yield from functions(child, f"{prefix}{child.name}.")
        else:
            yield from functions(child, prefix)


def _span(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def violations(measured: list[Measured], reviewed: dict[str, Exemption]) -> list[str]:
    """Say, one line each, what is over its budget and which exemptions are larger than what they cover or need not be.

    Args:
        measured: everything that has a budget.
        reviewed: the exemptions, by `Measured.name`.
    """
    sizes = {one.name: one for one in measured}
    complaints = [
        f"{one.name}: {one.lines} lines, the budget is {limit}"
        for one in measured
        if one.lines > (limit := reviewed[one.name].lines if one.name in reviewed else one.budget)
    ]
    for name in reviewed:
        if name not in sizes:
            complaints.append(f"{name}: stands in REVIEWED but does not exist; remove it there")
        elif sizes[name].lines <= sizes[name].budget:
            complaints.append(
                f"{name}: stands in REVIEWED but keeps its budget of {sizes[name].budget}; remove it there"
            )
    return complaints


def main(root: Path, reviewed: dict[str, Exemption]) -> int:
    """Print the packages' sizes and the violations below `root`; return the exit status."""
    measured = list(measure(root))
    longest: dict[str, Measured] = {}
    for one in measured:
        if "::" in one.name and one.name.startswith(f"{PACKAGES_DIR.as_posix()}/"):
            package = one.name.removeprefix(f"{PACKAGES_DIR.as_posix()}/").split("/")[0]
            longest[package] = max(longest.get(package, one), one, key=lambda function: function.lines)
    print(f"{'package':<12} {'lines':>6}   longest function")
    for one in measured:
        package = one.name.removeprefix(f"{PACKAGES_DIR.as_posix()}/")
        if one.budget == PACKAGE_BUDGET:
            function = longest.get(package)
            print(f"{package:<12} {one.lines:>6}   {f'{function.lines} {function.name}' if function else '-'}")
    print(f"{'all':<12} {sum(one.lines for one in measured if one.budget == PACKAGE_BUDGET):>6}")
    complaints = violations(measured, reviewed)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent, REVIEWED))
