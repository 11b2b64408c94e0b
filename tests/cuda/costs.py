"""Part c: what a training step and an inference cost, eager and compiled, beside plain loops; losses beside references.

Compilations begin at once, each in a process of its own; what is measured waits until nothing else runs, which is when
the input of this process is closed.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from setpred import HungarianLoss, MLPDecoder, chamfer_loss
from setpred.functional import linear_assignment
from tests.benchmarks.plain import Plain
from tests.benchmarks.work import Function, chamfer_by_broadcasting, huber_by_broadcasting, infer
from tests.cuda.compiled import READY, RESULT
from tests.cuda.measure import Cost, measure
from tests.cuda.part import ROOT, Options, main, row
from tests.cuda.works import HOW, IMAGE, QUICK_IMAGE, WORKS, backbone, image_step, work_classes

BUDGET, QUICK_BUDGET = 1.0, 0.02  # seconds of measuring a function
PAPER, WANTED = 1.75, 1.25  # the step with DSPN over that with the MLP, behind ResNet-34 at 128 x 128, 10 inner steps
MODES = ("implicit", "unrolled", "inference")
SHAPES = {"Clevr": "CLEVR, 32 x 10 x 18", "Mnist": "MNIST, 32 x 342 x 2"}
MATCHER = "torch_linear_assignment"
Baselines = dict[
    tuple[str, str], Cost
]  # of a plain loop, by work and "training" or "inference"; of the MLP, by precision


def title(work: str, mode: str, quick: bool) -> str:
    """Name a piece of work."""
    shape = f"{work} (small)" if quick else SHAPES[work]
    return f"{shape}: {mode}" if "inference" in mode else f"{shape}: training, {mode}"


class Compiled:
    """A process that compiles, waits, and measures when it is told to."""

    def __init__(self, work: str, mode: str, how: str, options: Options) -> None:
        self.work, self.mode, self.how = work, mode, how
        self.compiling, self.output, self.result = "", [], None
        self.ready, self.ended = threading.Event(), threading.Event()
        command = [sys.executable, "-m", "tests.cuda.compiled", work, mode, how, "--device", options.device]
        command += ["--budget", str(QUICK_BUDGET if options.quick else BUDGET), *["--quick"] * options.quick]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(READY):
                self.compiling = line.removeprefix(READY).strip()
                self.ready.set()
            elif line.startswith(RESULT):
                self.result = json.loads(line.removeprefix(RESULT))
            else:
                self.output.append(line)
        self.ended.set()
        self.ready.set()

    def measured(self, limit: float) -> dict[str, Cost] | None:
        """Let it measure; None where nothing came of it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.ended.wait(limit)
        self.process.kill()
        if self.result is None:
            return None
        return {name: Cost(tuple(cost["ms"]), cost["mib"]) for name, cost in self.result.items()}

    @property
    def why(self) -> str:
        """The last line of what it printed."""
        return next((line.strip() for line in reversed(self.output) if line.strip()), "it ended without a word")[:200]


def run(options: Options) -> None:
    """Start the compilations, wait, measure."""
    compiled = [
        Compiled(work, mode, how, options)
        for work in (WORKS[:1] if options.quick else WORKS)
        for mode in (MODES[:1] if options.quick else MODES)
        for how in (HOW[:1] if options.quick else HOW)
    ]
    sys.stdin.read()
    end = time.monotonic() + options.seconds - 5
    budget = QUICK_BUDGET if options.quick else BUDGET
    baselines: Baselines = {}
    try:
        eager(options, budget, baselines)
        for what, ours, name, reference in losses(options):
            compare(what, ours, name, reference, budget)
        all_compiled(compiled, options, end, baselines)
    finally:
        for process in compiled:
            process.process.kill()


def beside(cost: Cost, reference: Cost, name: str) -> dict[str, Any]:
    """Say what a cost is compared with, and how many times as fast it is."""
    ratio = reference.ms[1] / cost.ms[1]
    memory = f", {reference.memory}" if reference.memory else ""
    return {
        "beside": f"{name}: {reference.ms[1]:.4g} ms{memory}; {ratio:.2f} times as fast",
        "ms": cost.ms,
        "mib": cost.mib,
        "beside_ms": reference.ms,
        "beside_mib": reference.mib,
        "ratio": ratio,
    }


def eager(options: Options, budget: float, baselines: Baselines) -> None:
    """Plain loops, and ours without compilation; then the steps from images."""
    for name, work_class in work_classes(options.quick).items():
        with torch.device(options.device):
            unrolled, implicit = work_class("unrolled"), work_class("implicit")
        plain = Plain(unrolled)
        for mode, ours in {
            "unrolled": unrolled.train,
            "implicit": implicit.train,
            "inference": infer(unrolled),
            "inference under no_grad": infer(unrolled, torch.no_grad),
        }.items():
            kind = "inference" if "inference" in mode else "training"
            if (name, kind) not in baselines:
                baselines[name, kind] = measure(plain.infer() if kind == "inference" else plain.train, budget)
            cost = measure(ours, budget)
            what = f"{title(name, mode, options.quick)}, eager"
            row(what, str(cost), note=cost.memory, **beside(cost, baselines[name, kind], "plain loop"))
    from_images(options, budget, baselines)


def from_images(options: Options, budget: float, baselines: Baselines) -> None:
    """The paper's own measure, eager: DSPN's training step over the MLP's, behind the same backbone."""
    work_class = work_classes(options.quick)["Clevr"]
    for bf16 in (False, True):
        precision = "bf16" if bf16 else "fp32"
        for mode in ("mlp", "implicit", "unrolled"):
            with torch.device(options.device):
                work = work_class("implicit" if mode == "implicit" else "unrolled")
                mlp = MLPDecoder(work.latent, work.size, work.channels)
            decoder: nn.Module = mlp if mode == "mlp" else work.decoder
            step = image_step(decoder, work, bf16=bf16, quick=options.quick, device=options.device)
            cost = measure(step, budget)
            if mode == "mlp":
                baselines[precision, ""] = cost
                row(f"{_behind(options, precision)}, MLP decoder, eager", str(cost), note=cost.memory, ms=cost.ms)
            else:
                image_row(options, precision, f"DSPN {mode}, eager", cost, baselines)


def _behind(options: Options, precision: str) -> str:
    pixels = QUICK_IMAGE if options.quick else IMAGE
    if precision == "fp32" and options.device == "cuda":
        precision += " (convolutions in TF32, as is PyTorch's default)"
    return f"training step behind {backbone(8, options.quick)[1]} in {precision} at {pixels} x {pixels}"


def image_row(options: Options, precision: str, what: str, cost: Cost, baselines: Baselines) -> None:
    """Say what a step costs over that with the MLP."""
    ratio = cost.ms[1] / baselines[precision, ""].ms[1]
    wanted = f"; wanted {WANTED} with implicit" if "implicit" in what else ""
    row(
        f"{_behind(options, precision)}, {what}",
        f"{ratio:.2f} times the MLP's",
        beside=f"paper: {PAPER}{wanted}",
        note=f"{cost}" + (f", {cost.memory}" if cost.memory else ""),
        ratio=ratio,
        ms=cost.ms,
        mib=cost.mib,
    )


def all_compiled(compiled: list[Compiled], options: Options, end: float, baselines: Baselines) -> None:
    """Let those measure that are ready, what is to be compared with the paper first."""
    left = sorted(compiled, key=lambda p: (p.work != "Clevr", MODES.index(p.mode), p.how == "default"))
    while left and time.monotonic() < end:
        process = next((process for process in left if process.ready.is_set()), None)
        if process is None:
            time.sleep(0.2)
            continue
        left.remove(process)
        busy = sum(not other.ready.is_set() for other in left)
        one_compiled(process, options, end - time.monotonic(), baselines, busy)
    for process in left:
        row(_title(process, options), "not compiled in time")


def _title(process: Compiled, options: Options) -> str:
    how = "compiled" if process.how == "default" else process.how
    return f"{title(process.work, process.mode, options.quick)}, {how}"


def one_compiled(process: Compiled, options: Options, limit: float, baselines: Baselines, busy: int) -> None:
    """Let one of the compiled ones measure."""
    costs = process.measured(limit)
    print("".join(process.output), end="", flush=True)
    if costs is None:
        row(_title(process, options), "failed", note=process.why)
        return
    cost = costs["work"]
    reference = baselines[process.work, "inference" if process.mode == "inference" else "training"]
    note = f"first call {process.compiling} s" + (f", {cost.memory}" if cost.memory else "")
    if busy:
        note += f"; {busy} others were still compiling"
    row(_title(process, options), str(cost), note=note, **beside(cost, reference, "plain loop"))
    for precision in ("fp32", "bf16"):
        if precision in costs:
            how = "compiled" if process.how == "default" else process.how
            image_row(options, precision, f"DSPN {process.mode}, {how}", costs[precision], baselines)


def losses(options: Options) -> Iterator[tuple[str, Function, str, Function]]:
    """Losses and matching beside what they replace."""
    batch, n, channels = (2, 3, 2) if options.quick else (32, 10, 18)
    solvers = ["scipy", *["cuda"] * (options.device == "cuda" and find_spec(MATCHER) is not None)]
    with torch.device(options.device):
        pred, target = torch.rand(batch, n, channels + 1, requires_grad=True), torch.rand(batch, n, channels + 1)
        points, others = (torch.rand(352, 342, 3) if not options.quick else torch.rand(2, 5, 3) for _ in range(2))
        points.requires_grad_()

    def by_loop() -> None:
        cost = huber_by_broadcasting(pred, target)
        for matrix in cost.detach().cpu().numpy():
            linear_sum_assignment(matrix)
        cost.mean().backward()

    for solver in solvers:
        loss = HungarianLoss(presence="none", solver=solver)
        yield (
            f"Hungarian loss, {batch} x {n} x {channels + 1}, matched by {solver}",
            lambda loss=loss: loss(pred, target).backward(),
            "pairwise costs + SciPy in a loop",
            by_loop,
        )
    yield (
        f"Chamfer loss, {' x '.join(map(str, points.shape))}",
        lambda: chamfer_loss(points, others, presence="none").backward(),
        "all pairs at once",
        lambda: chamfer_by_broadcasting(points, others).backward(),
    )
    for batch, size in ((2, 3),) if options.quick else ((32, 10), (32, 100), (352, 10)):
        costs = torch.rand(batch, size, size, device=options.device)
        for solver in solvers:
            yield (
                f"assignment, {batch} x {size} x {size}, by {solver}",
                lambda costs=costs, solver=solver: linear_assignment(costs, solver=solver),
                "SciPy in a loop",
                lambda costs=costs: [linear_sum_assignment(matrix) for matrix in costs.cpu().numpy()],
            )
    if "cuda" not in solvers:
        row("matching on the GPU", "not measured", note=f"{MATCHER} or the GPU is not there")


def compare(what: str, ours: Function, name: str, reference: Function, budget: float) -> None:
    """Measure both."""
    cost, other = measure(ours, budget), measure(reference, budget)
    row(what, str(cost), note=cost.memory, **beside(cost, other, name))


if __name__ == "__main__":
    main(run)
