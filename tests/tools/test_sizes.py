"""The budgets are counted as documented, and cannot be passed by an exemption that nobody reviewed."""

import pytest

from tools.sizes import Exemption, Measured, main, measure, violations

SOURCE = '''"""A module of eleven lines."""


class Engine:
    def step(self):
        """Two lines
        of docstring are not counted."""
        def inner():
            return 1

        return inner
'''


@pytest.fixture
def root(tmp_path):
    package = tmp_path / "src" / "tenfold" / "engine"
    package.mkdir(parents=True)
    (package / "engine.py").write_text(SOURCE)
    (package.parent / "__init__.py").write_text('"""Root."""\n')
    return tmp_path


def test_measures_files_functions_and_packages(root):
    sizes = {one.name: one.lines for one in measure(root)}
    assert sizes == {
        "src/tenfold/__init__.py": 1,
        "src/tenfold/engine/engine.py": 11,
        "src/tenfold/engine/engine.py::Engine.step": 5,  # 7 from `def` to `return`, less 2 of docstring
        "src/tenfold/engine/engine.py::Engine.step.inner": 2,
        "src/tenfold/engine": 11,
    }


@pytest.mark.parametrize(("folder", "lines", "status"), [("nn", 500, 0), ("nn", 501, 1), ("kernels", 900, 0)])
def test_file_budget(root, capsys, folder, lines, status):
    path = root / "src" / "tenfold" / folder / "long.py"
    path.parent.mkdir()
    path.write_text("x = 1\n" * lines)
    assert main(root, {}) == status
    printed = capsys.readouterr()
    assert f"{folder:<12} {lines:>6}" in printed.out
    assert ("long.py: 501 lines, the budget is 500" in printed.err) == (status == 1)


def test_exemptions_are_limits_and_do_not_outlive_their_need():
    measured = [Measured("grown", 71, 60), Measured("agreed", 70, 60), Measured("shrunk", 60, 60)]
    reviewed = {name: Exemption(70, "because") for name in ("grown", "agreed", "shrunk", "deleted")}
    complaints = violations(measured, reviewed)
    assert [complaint.split(":")[0] for complaint in complaints] == ["grown", "shrunk", "deleted"]
