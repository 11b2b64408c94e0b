"""Part e: the examples as a user runs them, four at once: boxes and states, by DSPN and by the MLP."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.cuda.part import ROOT, Options, main, row

RUNS = (("clevr_boxes", "recommended"), ("clevr_boxes", "mlp"), ("clevr_state", "recommended"), ("clevr_state", "mlp"))
PICTURES = {"clevr_boxes": "boxes", "clevr_state": "states"}
LONGEST = 240  # seconds of training
AROUND = 80  # seconds for what comes before it and after it: rendering, evaluation, pictures
FEW = ["--quick", "--steps", "2", "--threads", "1", "--backbone", "small", "--size", "16", "--max-objects", "3"]
FEW += ["--latent", "16", "--width", "16"]


class Run:
    """One of the runs."""

    def __init__(self, script: str, decoder: str, seconds: float, options: Options) -> None:
        self.script, self.decoder = script, decoder
        self.out, self.log = options.scratch / f"{script}-{decoder}", options.scratch / f"{script}-{decoder}.txt"
        arguments = ["--decoder", decoder, "--out", self.out, "--cache", options.scratch, "--device", options.device]
        if options.quick:
            arguments += FEW + ["--eval-steps", 2] * (decoder == "recommended")
        else:
            arguments += ["--seconds", seconds, "--validations", 4, "--validate-on", 500]
            # Compiling 20 inner steps would take a good part of the time; what it gives, part c says.
            arguments += ["--no-compile"] * (decoder == "recommended")
        self.command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), *map(str, arguments)]
        self.process = subprocess.Popen(
            self.command,
            cwd=options.scratch,
            env=os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join([str(ROOT), *_path()])},
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
        )

    def result(self) -> dict[str, Any] | None:
        """What it wrote at its end."""
        file = self.out / "result.json"
        return json.loads(file.read_text()) if file.exists() else None


def _path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]


def run(options: Options) -> None:
    """Start the first, which renders the scenes; then the others; then say what came of them."""
    end = time.monotonic() + options.seconds - 3
    seconds = min(LONGEST, options.seconds - AROUND)
    chosen = [RUNS[0], RUNS[3]] if options.quick else RUNS
    runs = [Run(*chosen[0], seconds, options)]
    while not options.quick and not _rendered(options.scratch) and runs[0].process.poll() is None:
        if time.monotonic() > end - seconds:
            break
        time.sleep(0.5)
    runs += [Run(*one, seconds, options) for one in chosen[1:]]
    try:
        while time.monotonic() < end and any(one.process.poll() is None for one in runs):
            time.sleep(0.5)
    finally:
        for one in runs:
            one.process.kill()
    for one in runs:
        report(one, seconds, options)
    if any(one.result() is None for one in runs):
        sys.exit(1)


def _rendered(cache: Path) -> bool:
    """Whether training and validation scenes are there; the test's are rendered at the end, by each run."""
    return len(list((cache / "rendered").glob("*.pt"))) >= 2


def report(one: Run, seconds: float, options: Options) -> None:
    """Hand over a run's scores, its tables and its picture."""
    text = one.log.read_text(errors="replace").replace("\r", "\n")
    printed = "\n".join(line for line in text.splitlines() if line.strip() and "%|" not in line)  # no progress bars
    print(f"\n$ {' '.join(one.command[1:])}\n{printed[-6000:]}", flush=True)
    name, result = f"{one.script}, {one.decoder}", one.result()
    if result is None:
        row(name, "did not come to its end", note=printed.rpartition("\n")[2][-200:])
        return
    budget = "a few steps" if options.quick else f"{seconds:.0f} s of training, four runs at once"
    for steps, scores in result["test"].items():
        value = ", ".join(f"{key} {100 * score:.1f}" for key, score in scores.items() if "AP" in key)
        row(
            name if steps == "-" else f"{name}, {steps} inner steps",
            value,
            note=f"{result['step']} steps, {budget}; {result['data']}",
            scores=scores,
        )
    picture = one.out / f"{PICTURES[one.script]}.png"
    if picture.exists():
        shutil.copy(picture, options.out / f"{PICTURES[one.script]}-{one.decoder}.png")


if __name__ == "__main__":
    main(run)
