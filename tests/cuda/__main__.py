"""All that only a GPU can show, in one command of at most nine minutes: python -m tests.cuda --out DIR.

    a  suite            tests of functional, encoders, decoders, losses and metrics on the GPU, in several processes
    b  synchronisation  training steps that never wait for the GPU
    c  costs            time and memory of training, inference, losses and matching, beside references
    d  scenes           rendered images a second
    e  training         the examples as a user runs them: boxes and states of rendered scenes, by iDSPN and the MLP

It runs from the source tree, with nothing installed but what the tests import. Each part is a process of its own with a
time limit, so that what happens to one leaves the others; whatever is known is written into DIR at once: `results.md`,
`results.json`, `log.txt` and four pictures. What only correctness is asked of runs side by side; timings run alone.
`--device cpu --quick` runs the same code on little data, without a GPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from tests.benchmarks.__main__ import machine
from tests.cuda.part import MARK, ROOT, Options

# Seconds after which a part is stopped; of those that run side by side, the longest counts.
LIMITS = {"suite": 140, "synchronisation": 100, "costs": 110, "scenes": 25, "training": 325}
TOTAL = 535
PARTS = dict(zip("abcde", LIMITS, strict=True))
SLOWER = 10  # times as long may a part take with --quick: other work may be going on there
GRACE = 5  # seconds for a part to say what it has when it is asked to stop
COLUMNS = ("what", "value", "beside", "note")


class Results:
    """What is known so far, in DIR."""

    def __init__(self, out: Path, device: str, quick: bool) -> None:
        self.out, self.quick, self.lock = out, quick, threading.Lock()
        self.machine = machine() | {"python": sys.version.split()[0], "device": device}
        self.parts: dict[str, dict[str, Any]] = {}
        out.mkdir(parents=True, exist_ok=True)
        self.log = (out / "log.txt").open("w", buffering=1)

    def part(self, name: str, **changes: Any) -> None:
        with self.lock:
            self.parts.setdefault(name, {"status": "running", "rows": []}).update(changes)
            self.write()

    def line(self, name: str, line: str) -> None:
        """Take a line of a part's output."""
        with self.lock:
            if not line.startswith(MARK):
                self.log.write(f"{name}: {line}")
                return
            row = json.loads(line.removeprefix(MARK))
            self.parts[name]["rows"].append(row)
            self.write()
        print(f"{name}: {row['what']}: {row['value']}", flush=True)

    def write(self) -> None:
        everything = {"machine": self.machine, "parts": self.parts}
        for file, text in (("results.json", json.dumps(everything, indent=1)), ("results.md", self.table())):
            unfinished = self.out / f".{file}"
            unfinished.write_text(text + "\n")
            unfinished.replace(self.out / file)

    def table(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield ", ".join(f"{key} {value}" for key, value in self.machine.items() if value != "")
        if self.quick:
            yield "\nWith --quick: it shows that the code runs; its figures mean nothing."
        yield "\n| part | what | result | beside | note |\n|---|---|---|---|---|"
        for name in (name for name in LIMITS if name in self.parts):
            part = self.parts[name]
            yield f"| {name} | | {part['status']} | | |"
            for row in part["rows"]:
                yield "| " + " | ".join(["", *(row[key].replace("|", "/") for key in COLUMNS)]) + " |"


class Process:
    """One part, running."""

    def __init__(self, name: str, results: Results, options: Options) -> None:
        self.name, self.results, self.start = name, results, time.monotonic()
        results.part(name, status="running")
        command = [sys.executable, "-m", f"tests.cuda.{name}", *options.arguments]
        path = os.pathsep.join(filter(None, [str(ROOT / "examples"), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            self.results.line(self.name, line)

    def go(self) -> None:
        """Say that nothing else runs from now on."""
        self.start = time.monotonic()
        assert self.process.stdin is not None
        self.process.stdin.close()

    def stop(self) -> None:
        """Kill the part and whatever it has started."""
        for sent, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10)):
            try:
                os.killpg(self.process.pid, sent)
                self.process.wait(wait)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def finish(self, limit: float) -> None:
        """Wait for the part, at most until its limit."""
        try:
            code = self.process.wait(max(limit - (time.monotonic() - self.start), 0.1))
            status = "done" if code == 0 else f"failed with exit code {code}, see log.txt"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        self.stop()
        self.reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.results.part(self.name, status=status, seconds=round(time.monotonic() - self.start, 1))


def run(parts: list[str], results: Results, options: Options) -> None:
    """Run the parts in the order of their worth."""
    deadline = time.monotonic() + options.seconds
    running: dict[str, Process] = {}
    limits = {name: limit * (SLOWER if options.quick else 1) for name, limit in LIMITS.items()}

    def start(name: str) -> None:
        limit = min(limits[name], deadline - time.monotonic())
        if limit < 10:
            results.part(name, status="no time was left")
        else:
            running[name] = Process(name, results, options._replace(seconds=limit))

    def finish(name: str) -> None:
        if name in running:
            running[name].finish(min(limits[name], deadline - running[name].start))

    try:
        # Compilations take minutes of processors, not of the GPU: those for the timings begin now.
        for name in ("costs", "suite", "synchronisation"):
            if name in parts:
                start(name)
        for name in ("synchronisation", "suite"):
            if name in running:
                running[name].go()
                finish(name)
        for name in ("costs", "scenes", "training"):
            if name in parts:
                if name not in running:
                    start(name)
                if name in running:
                    running[name].go()
                finish(name)
    finally:
        for process in running.values():
            process.stop()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where results are written")
    parser.add_argument("--parts", default=",".join(PARTS), help="which parts, by their letters; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="the same on little data: shows that it runs")
    parser.add_argument("--seconds", type=float, default=TOTAL, help=f"for all parts together; default: {TOTAL}")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts must be letters among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device; --device cpu --quick shows that the code runs")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the parts are stopped too
    results = Results(arguments.out, arguments.device, arguments.quick)
    parts = [PARTS[letter] for letter in sorted(arguments.parts.split(","))]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        options = Options(
            arguments.device, arguments.seconds, arguments.quick, arguments.out.resolve(), Path(scratch).resolve()
        )
        run(parts, results, options)
    results.log.close()
    print("\n" + results.table())
    sys.exit(any(part["status"] != "done" for part in results.parts.values()))


if __name__ == "__main__":
    main()
