"""The script that runs the suite with other versions, without installing any."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import floors

PYPROJECT = """
[project]
dependencies = ["torch>=2.7", "six"]
[project.optional-dependencies]
cuda = ["POT>=0.9.4"]
test = ["setpred[cuda]", "pytest>=8"]
"""


def test_floors_are_read_from_the_project(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(PYPROJECT)
    assert floors.floors(tmp_path / "pyproject.toml") == ["torch==2.7", "POT==0.9.4", "pytest==8"]


def test_every_dependency_declares_a_floor() -> None:
    declared = floors.requirements(floors.ROOT / "pyproject.toml")
    assert [name for name in declared if ">=" not in name and not name.startswith("setpred[")] == []


def test_results_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_passes_too(): pass\n"
        "def test_fails(): assert False\n"
        "def test_is_skipped(): pytest.skip()\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_errs(broken): pass\n"
    )
    row = floors.measure(Path(sys.executable), ["test_it.py"], tmp_path / "report.xml", tmp_path)
    assert {name: row[name] for name in ("passed", "failed", "skipped", "exit code")} == {
        "passed": 2,
        "failed": 2,
        "skipped": 1,
        "exit code": 1,
    }
    assert row["Python"] == sys.version.split()[0]
    assert row["packages"]["pytest"] == pytest.__version__
    assert "test_fails" in (tmp_path / "report.log").read_text()


def test_a_run_without_a_report_has_failed(tmp_path: Path) -> None:
    row = floors.measure(Path(sys.executable), ["--no-such-option"], tmp_path / "report.xml", tmp_path)
    assert (row["passed"], row["failed"]) == (0, "all")
    assert row["exit code"]


def test_table() -> None:
    rows = [{"Python": "3.11.7", "torch": "2.7.1", "passed": 3, "others": "floor"}, {"others": "newest"}]
    first, rule, *lines = floors.table(rows).splitlines()
    assert first.startswith("| Python | torch |")
    assert rule.count("---") == first.count("|") - 1 == len(floors.COLUMNS)
    assert lines[0].startswith("| 3.11.7 | 2.7.1 |  |  |  | floor | 3 |")
    assert len(lines) == 2


def test_a_combination_that_cannot_be_had_is_a_row_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def install(python: str, versions: str, folder: Path) -> Path:
        if versions == "lowest":
            raise subprocess.CalledProcessError(1, "pip")
        folder.mkdir()
        assert python == "python3.13"
        return Path(sys.executable)

    monkeypatch.setattr(floors, "install", install)
    monkeypatch.setattr(floors, "measure", lambda *_: {"Python": "3.13.0", "failed": 0, "exit code": 0})
    assert floors.main([str(tmp_path), "lowest", "python3.13:torch==2.9.1"]) == 1
    shown = capsys.readouterr().out
    assert "not installed" in shown
    assert "| 3.13.0 |" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["floors.json"]  # the environment is gone
