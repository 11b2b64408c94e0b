"""Part a: the tests that know devices, in several processes, each with every K-th test."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.cuda.part import ROOT, Options, main, row
from tests.devices import ON_EVERY_DEVICE

FEW = ("tests/functional/test_argsort.py", "tests/losses/test_representation.py")
STARTS = 4  # of a process in whose place another one goes on
LISTED = 30  # failures that get a row of their own


class Shard:
    """One process after the other over the same tests, until all of them have an outcome."""

    def __init__(self, index: int, of: int, options: Options) -> None:
        self.index, self.of, self.options, self.starts = index, of, options, 0
        self.file = options.scratch / f"outcomes-{index}.jsonl"
        self.start()

    def start(self) -> None:
        from tests.cuda.outcomes import DONE, FILE  # it imports pytest, which may be missing

        self.starts += 1
        done = len(self.outcomes())
        tests = FEW if self.options.quick else [f"tests/{folder}" for folder in ON_EVERY_DEVICE]
        command = [sys.executable, "-m", "pytest", *tests, "--device", self.options.device]
        command += ["--shard", f"{self.index}/{self.of}", "-p", "tests.cuda.outcomes", "-p", "no:cacheprovider", "-q"]
        self.process = subprocess.Popen(
            [*command, "--tb=short"],
            cwd=ROOT,
            env=os.environ | {FILE: str(self.file), DONE: str(done), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=(self.options.scratch / f"pytest-{self.index}.txt").open("a"),
            stderr=subprocess.STDOUT,
        )

    def outcomes(self) -> list[dict[str, Any]]:
        """Of every test that was begun, the last that was written of it; a failure is not made up for."""
        tests: dict[str, dict[str, Any]] = {}
        for line in map(json.loads, self.file.read_text().splitlines() if self.file.exists() else ()):
            if tests.get(line["test"], line)["outcome"] != "failed":
                tests[line["test"]] = line
        return list(tests.values())

    def is_done(self) -> bool:
        """Whether its process has ended with every test done; starts another one where it broke off."""
        code = self.process.poll()
        if code is None:
            return False
        if code in (0, 1, 5, -signal.SIGTERM) or self.starts == STARTS:  # passed, failed, no tests, asked to stop
            return True
        print(f"process {self.index} ended with exit code {code} after {len(self.outcomes())} tests", flush=True)
        self.start()
        return False


def run(options: Options) -> None:
    """Run the tests, as many processes as half of the processors, and say what came of them."""
    missing = [name for name in ("pytest", "hypothesis") if find_spec(name) is None]
    if missing:
        row("tests", f"not run: {' and '.join(missing)} not installed")
        return
    processes = 1 if options.quick else max((os.cpu_count() or 2) // 2, 1)
    start = time.monotonic()
    shards = [Shard(index, processes, options) for index in range(processes)]
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    while not stopped and time.monotonic() - start < options.seconds - 5:
        done = [shard.is_done() for shard in shards]  # each of them is asked: it may have to go on
        if all(done):
            break
        time.sleep(0.2)
    report(options, shards, time.monotonic() - start)


def report(options: Options, shards: list[Shard], seconds: float) -> None:
    """Count outcomes, list failures."""
    unfinished = [shard for shard in shards if shard.process.poll() is None]
    for shard in unfinished:
        shard.process.kill()
    outcomes = []
    for shard in shards:
        for outcome in shard.outcomes():
            if outcome["outcome"] != "begun":
                outcomes.append(outcome)
            elif shard not in unfinished:
                outcomes.append(outcome | {"outcome": "failed", "text": "E   the process ended in it"})
    counts = {kind: sum(o["outcome"] == kind for o in outcomes) for kind in ("passed", "failed", "skipped")}
    text = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    note = f"{len(shards)} processes, {seconds:.0f} s"
    broken = sum(shard.starts - 1 for shard in shards)
    if unfinished:
        note += f"; {len(unfinished)} of them had not come to their end"
    if broken:
        note += f"; {broken} broke off and were started again"
    row("tests of " + ", ".join(ON_EVERY_DEVICE), text or "none ended", note=note, **counts, seconds=round(seconds, 1))
    failures = [o for o in outcomes if o["outcome"] == "failed"]
    for outcome in failures[:LISTED]:
        lines = [line[2:].strip() for line in outcome["text"].splitlines() if line.startswith("E ")]
        row(f"`{outcome['test']}`", "failed", note=(lines or ["see log.txt"])[0][:200])
    for outcome in failures:
        print(f"\n{outcome['test']}\n{outcome['text'][-3000:]}", flush=True)
    if not outcomes or broken:
        for shard in shards:
            print(_tail(options.scratch / f"pytest-{shard.index}.txt"), flush=True)
    if failures or unfinished or not outcomes:
        sys.exit(1)


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-15:]) if path.exists() else ""


if __name__ == "__main__":
    main(run)
