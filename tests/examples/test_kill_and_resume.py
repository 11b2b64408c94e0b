"""A training is killed at random moments and resumed: it ends as if nothing had happened.

Once in the suite; ten times with

    SETPRED_KILLS=10 pytest tests/examples/test_kill_and_resume.py
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples/mnist_sets.py"
KILLS = int(os.environ.get("SETPRED_KILLS", "1"))


def start(out: Path) -> subprocess.Popen[bytes]:
    # More than one epoch of 1,200 digits, and the last batches of it; a checkpoint after every step.
    command = [
        sys.executable,
        str(SCRIPT),
        *["--device", "cpu", "--threads", "1", "--batch-size", "32", "--latent", "8", "--width", "8"],
    ]
    command += [*f"--inner-steps 2 --steps {60 * (KILLS + 1)} --validations 6 --validate-on 20".split()]
    command += ["--save-every", "0", "--no-test", "--resume", "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def kill_at_random(process: subprocess.Popen[bytes], checkpoint: Path) -> bool:
    """Kill some time after the process's first checkpoint; returns whether it was still running."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
        time.sleep(0.005)
    time.sleep(random.uniform(0, 1.0))
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


def without_times(value: object) -> object:
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name != "seconds"}
    return value


def test_killed_and_resumed_run_ends_like_an_undisturbed_one(tmp_path):
    pytest.importorskip("accelerate")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(undisturbed))
    kills = sum(kill_at_random(start(killed), killed / "last.pt") for _ in range(KILLS))
    assert kills == KILLS  # otherwise this has shown nothing: more --steps
    finish(start(killed))
    for name in ("result.json", "metrics.jsonl"):
        expected, found = (
            [without_times(json.loads(line)) for line in text.splitlines()]
            if name.endswith("l")
            else without_times(json.loads(text))
            for text in ((run / name).read_text() for run in (undisturbed, killed))
        )
        assert found == expected
    for name in ("best.pt", "last.pt"):
        expected, found = (torch.load(run / name, weights_only=True)["model"] for run in (undisturbed, killed))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
