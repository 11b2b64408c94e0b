"""`python -m tests.cuda` is known to run, and to keep what it has, before a GPU is ever asked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.benchmarks.plain import Plain
from tests.cuda.__main__ import LIMITS, Process, Results
from tests.cuda.outcomes import DONE, FILE
from tests.cuda.part import ROOT, Options
from tests.cuda.works import WORKS, work_classes


def test_the_whole_of_it_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cuda", "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {
        "results.json",
        "results.md",
        "log.txt",
        "boxes-recommended.png",
        "states-mlp.png",
    }  # four with a GPU
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["parts"].keys() == LIMITS.keys()
    for part in results["parts"].values():
        assert part["status"] == "done"
        assert part["rows"]
    assert results["parts"]["suite"]["rows"][0]["passed"] > 0
    assert (tmp_path / "results.md").read_text().strip() in done.stdout


@pytest.mark.parametrize("name", WORKS)
def test_the_plain_loop_is_the_decoder(name: str) -> None:
    work = work_classes(quick=True)[name]("unrolled")
    ours, theirs = [], []
    for train, gradients in ((work.train, ours), (Plain(work).train, theirs)):
        train()
        gradients += [parameter.grad for parameter in work.decoder.parameters()]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        sets, masks = Plain(work).decode(work.z.detach())
        torch.testing.assert_close((sets[-1], masks[-1]), tuple(work.decoder(work.z)[:2]), rtol=1e-4, atol=1e-5)


def test_a_part_that_takes_too_long_is_stopped_and_what_it_had_is_kept(tmp_path: Path) -> None:
    results = Results(tmp_path, "cpu", quick=True)
    process = Process("scenes", results, Options("cpu", 10.0, True, tmp_path, tmp_path))
    results.line("scenes", 'ROW {"what": "something", "value": "found", "beside": "", "note": ""}\n')
    process.finish(limit=0.2)
    results.log.close()
    assert process.process.returncode is not None
    kept = json.loads((tmp_path / "results.json").read_text())["parts"]["scenes"]
    assert kept["status"] == "stopped after 0 s"
    assert kept["rows"][0]["value"] == "found"


def test_where_the_gpu_no_longer_answers_another_process_goes_on(tmp_path: Path) -> None:
    tests, outcomes = tmp_path / "test_it.py", tmp_path / "outcomes.jsonl"
    tests.write_text(
        "def test_a(): pass\n"
        "def test_b(): raise RuntimeError('CUDA error: device-side assert triggered')\n"
        "def test_c(): pass\n"
    )
    for done in (0, 2):
        subprocess.run(
            [sys.executable, "-m", "pytest", str(tests), "-p", "tests.cuda.outcomes", "-p", "no:cacheprovider"],
            cwd=ROOT,
            env=os.environ | {FILE: str(outcomes), DONE: str(done)},
            capture_output=True,
        )
    found = [json.loads(line) for line in outcomes.read_text().splitlines()]
    assert [(line["test"][-1], line["outcome"]) for line in found] == [
        *[("a", "begun"), ("a", "passed"), ("b", "begun"), ("b", "failed")],
        *[("c", "begun"), ("c", "passed")],
    ]
