import subprocess
import sys
from pathlib import Path

import pytest
from losses_in_detr import main

SCRIPT = Path(__file__).parents[2] / "examples/losses_in_detr.py"


def test_quick_run_prints_matched_results():
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "matched" in done.stdout.lower()


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_are_honoured_with_quick(steps, capsys):
    main(["--quick", "--steps", str(steps)])
    assert f"{steps}/{steps}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--seed", "-1"]])
def test_bad_numbers_are_errors(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"{arguments[0]} must be at least" in capsys.readouterr().err
