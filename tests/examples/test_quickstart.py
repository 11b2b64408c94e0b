import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples/quickstart.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_quick_run_prints_the_table_and_writes_figures_and_picture(tmp_path):
    pytest.importorskip("sklearn")
    done = run("--quick", "--seeds", 2, "--json", tmp_path / "figures.json", "--out", tmp_path / "pictures")
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures) == ["DSPN", "iDSPN", "MLP", "LSTM"]
    assert all(len(figure["hungarian_error"]) == 2 for figure in figures.values())
    assert (tmp_path / "pictures/digits.png").stat().st_size > 10_000


def test_bad_number_of_seeds_is_an_error():
    assert "--seeds must be at least 1" in run("--seeds", 0).stderr
