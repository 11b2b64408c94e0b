"""`python -m tests.benchmarks --against COMMIT`: that it runs and decides, not what it measures."""

import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import against
from tests.benchmarks.__main__ import main

ROOT = Path(against.__file__).parents[2]
pytestmark = pytest.mark.skipif(
    subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, check=False).returncode != 0,
    reason="needs the repository",
)


@pytest.mark.parametrize(("threshold", "status"), [(float("inf"), 0), (0.0, 1)])
def test_two_checkouts_take_turns(threshold: float, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert against.compare("HEAD", "hungarian", threshold, rounds=3) == status
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| Hungarian")]
    assert len(rows) == 1
    times = rows[0].split("|")[2:4]
    assert all(0 < float(time) < 1e4 for time in times)  # milliseconds


def test_what_a_commit_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(against, "works", lambda: {"unheard of": None})
    assert against.compare("HEAD", threshold=1.0) == 0
    assert "| unheard of | - | - | KeyError: 'unheard of' |" in capsys.readouterr().out


def test_an_unknown_commit() -> None:
    with pytest.raises(SystemExit, match=r"^git knows no commit 'nonsense'$"):
        against.compare("nonsense", "hungarian")


def test_a_name_that_no_work_has() -> None:
    with pytest.raises(SystemExit, match="no work has 'hungerian' in its name: small sets"):
        against.compare("HEAD", "hungerian")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--against", "HEAD", "--json", "now.json"], "--against writes no file: leave --json and --plot out"),
        (
            ["--only", "ing", "--plot", "scaling.png"],
            "--plot is of how time and memory grow, which --only ing leaves out",
        ),
    ],
)
def test_options_that_would_be_ignored(
    options: list[str], error: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", *options])
    with pytest.raises(SystemExit):
        main()
    assert error in capsys.readouterr().err
