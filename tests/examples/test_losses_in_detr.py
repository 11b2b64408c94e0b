import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples/losses_in_detr.py"


def test_quick_run_prints_matched_results():
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "matched" in done.stdout.lower()
