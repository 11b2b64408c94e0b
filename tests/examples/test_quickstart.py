import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

import quickstart
from common.digits import load_digit_sets

SCRIPT = Path(__file__).parents[2] / "examples/quickstart.py"


def run(*arguments: object, script: Path = SCRIPT, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_quick_run_prints_the_table_and_writes_figures_and_picture(tmp_path):
    """Of a copy, with nothing beside it: it is one file."""
    copy = shutil.copy(SCRIPT, tmp_path / "mine.py")
    done = run("--quick", "--seeds", 2, "--json", "new/figures.json", script=copy, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "±" in done.stdout
    figures = json.loads((tmp_path / "new/figures.json").read_text())
    assert list(figures) == ["DSPN", "MLP", "LSTM"]
    assert all(len(figure["hungarian_error"]) == 2 for figure in figures.values())
    picture = "out/quickstart-quick/digits.png"  # not in the place of a real one
    assert (tmp_path / picture).stat().st_size > 10_000
    assert done.stdout.endswith(f"picture: {picture}\n")


def test_digits_are_those_of_the_other_examples():
    splits = load_digit_sets()
    for mine, theirs in zip(quickstart.load_sets(), (splits.train, splits.test), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_mistakes_are_said_before_the_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "side_by_side", lambda runs: pytest.fail("a training has begun"))
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--seeds", 0], "--seeds must be at least 1, got 0"),
        (["--out", tmp_path / "file"], "File exists"),
        (["--out", tmp_path / "file/below"], "Not a directory"),
        (["--json", tmp_path / "file/figures.json", "--out", tmp_path], "File exists"),
        (["--json", tmp_path, "--out", tmp_path], "is a directory"),
    ):
        with pytest.raises(SystemExit):
            quickstart.main(list(map(str, arguments)))
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_ctrl_c_is_one_line(tmp_path):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    errors, begun = "", list(quickstart.RECIPES)[: os.cpu_count()]
    while not all(f"{name:5} seed 0" in errors for name in begun):
        errors += process.stderr.read(1)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # all processes get it, as from a terminal
    began = time.monotonic()
    output, rest = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert (process.returncode, output) == (1, "")
    assert rest.endswith("\ninterrupted\n")
    assert "Traceback" not in rest


def test_ctrl_c_is_the_parents(monkeypatch):
    """A process that waits for work would print a traceback."""
    handlers = []
    monkeypatch.setattr(quickstart.signal, "signal", lambda number, handler: handlers.append((number, handler)))
    quickstart.start_process(quickstart.tqdm.get_lock())
    assert handlers == [(signal.SIGINT, signal.SIG_IGN)]
