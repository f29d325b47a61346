"""`tenfold doctor` on a machine where all is well, and on one where the built-in model is broken."""

import subprocess
import sys
from pathlib import Path

import pytest

from tenfold.cli import doctor

TENFOLD = str(Path(sys.executable).with_name("tenfold"))


@pytest.mark.timeout(400)  # compiles where the cache is cold
def test_all_is_well():
    done = subprocess.run([TENFOLD, "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("versions", "memory", "caches", "devices", "generation"):
        assert f"\n{name}\n" in "\n" + done.stdout
    assert "cpu:0" in done.stdout
    assert "beginning with" in done.stdout
    assert done.stdout.endswith("Everything works.\n")


def test_what_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    import typer

    monkeypatch.setattr("tenfold.base.builtin.builtin_model", lambda: tmp_path / "gone")
    monkeypatch.setattr(doctor, "_PROBE", "import sys; sys.exit('no device answers')")
    with pytest.raises(typer.Exit) as caught:
        doctor.doctor(timeout=60)
    assert caught.value.exit_code == 1
    shown = capsys.readouterr().out
    assert "FAILED: RuntimeError: no device answers" in shown
    assert "gone is not a directory" in shown
    assert "Not working: devices, generation." in shown
