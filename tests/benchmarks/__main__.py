"""The table of docs/performance.md: python -m tests.benchmarks [--json FILE] [--plot FILE] [--only TEXT].

Every row is a piece of work beside a reference for it. Both run in turn, round after round, so that whatever slows the
machine slows both; the ratio is that of the reference's time to ours, taken within each round.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from setpred import (
    ChamferLoss,
    FSPool,
    HungarianLoss,
    LSTMDecoder,
    MLPDecoder,
    PooledEncoder,
    RelationEncoder,
)
from setpred.functional import argsort_descending
from tests import oracles
from tests.benchmarks.against import compare
from tests.benchmarks.scaling import plot, scaling
from tests.benchmarks.work import (
    BATCH,
    Clevr,
    ClevrPooled,
    Function,
    Mnist,
    chamfer_by_broadcasting,
    huber_by_broadcasting,
    infer,
    products,
    seconds,
)

# (name, ours, name of the reference, reference)
Row = tuple[str, Function, str, Function]


def steps() -> Iterator[Row]:
    """The paper's two shapes, 10 inner steps, batch of 32."""
    works = {"CLEVR": Clevr, "CLEVR with PooledEncoder": ClevrPooled, "MNIST": Mnist}
    for title, work in works.items():
        name, what = work.__name__, "matrix products alone"
        yield f"{title}: training, unrolled", work("unrolled").train, what, products(name, 10, 10, 1)
        yield f"{title}: training, implicit", work("implicit").train, what, products(name, 10, 1, 1)
        yield f"{title}: inference", infer(work("unrolled")), what, products(name, 10, 0, 0)
        kept, again = work("unrolled"), work("unrolled")
        again.decoder.checkpoint = True
        yield f"{title}: training, unrolled, checkpoint=True", again.train, "unrolled, all kept", kept.train


def forward_backward(module: torch.nn.Module, *inputs: torch.Tensor) -> Function:
    def run() -> None:
        out = module(*inputs)
        (out if isinstance(out, torch.Tensor) else out.elements).sum().backward()

    return run


def layers() -> Iterator[Row]:
    """Forward and backward of each layer, batch of 32; the oracles are the formulas written literally."""
    x = torch.rand(BATCH, 100, 64, requires_grad=True)
    fspool = FSPool(64)
    yield (
        "FSPool, 100 x 64",
        forward_backward(fspool, x),
        "torch.sort and its backward alone",
        lambda: torch.sort(x, dim=1, descending=True, stable=True).values.sum().backward(),
    )
    few = torch.rand(4, 20, 8, requires_grad=True)
    small = FSPool(8)
    yield (
        "FSPool, 4 sets of 20 x 8",
        forward_backward(small, few),
        "tests/oracles.py",
        lambda: oracles.sort_pool(few, small.weight).sum().backward(),
    )
    values = torch.randn(512, BATCH, 100)
    yield (
        "argsort, 512 x 32 rows of 100",
        lambda: argsort_descending(values),
        "torch.sort",
        lambda: torch.sort(values, descending=True, stable=True),
    )
    for title, encoder, size, channels in (
        ("RelationEncoder(18, 512, 512), 10 x 18", RelationEncoder(18, 512, 512), 10, 18),
        ("PooledEncoder(2, 64, 256), 342 x 2", PooledEncoder(2, 64, 256), 342, 2),
    ):
        sets = torch.rand(BATCH, size, channels, requires_grad=True)
        work = "Clevr" if size == 10 else "Mnist"
        yield title, forward_backward(encoder, sets), "matrix products alone", products(work, 0, 0, 1)
    z = torch.randn(BATCH, 512)
    for decoder in (MLPDecoder(512, 10, 18), LSTMDecoder(512, 10, 18)):
        yield (
            f"{type(decoder).__name__}, 10 x 18",
            forward_backward(decoder, z),
            "DSPN unrolled, the same shapes",
            Clevr("unrolled").train,
        )


def losses() -> Iterator[Row]:
    """Forward and backward of the set losses."""
    pred, mask = torch.rand(BATCH, 10, 18, requires_grad=True), torch.rand(BATCH, 10, requires_grad=True)
    target, target_mask = torch.rand(BATCH, 10, 18), torch.rand(BATCH, 10) < 0.6
    both = torch.cat([pred, mask.unsqueeze(-1)], -1).detach().requires_grad_()
    other = torch.cat([target, target_mask.unsqueeze(-1)], -1)

    def by_loop() -> None:
        cost = huber_by_broadcasting(both, other)
        for matrix in cost.detach().cpu().numpy():
            linear_sum_assignment(matrix)
        cost.mean().backward()

    hungarian = HungarianLoss()
    yield (
        "Hungarian, 32 x 10 x 19",
        lambda: hungarian(pred, target, mask, target_mask).backward(),
        "SciPy in a loop + pairwise costs",
        by_loop,
    )
    points, others = torch.rand(352, 342, 3, requires_grad=True), torch.rand(352, 342, 3)

    chamfer = ChamferLoss(presence="none")
    yield (
        "Chamfer, 352 x 342 x 3",
        lambda: chamfer(points, others).backward(),
        "all pairs at once",
        lambda: chamfer_by_broadcasting(points, others).backward(),
    )


def measure(row: Row, budget: float) -> dict[str, Any]:
    """Median and 10 % to 90 % quantiles over interleaved rounds, as many as fit the budget of seconds, 5 to 200."""
    title, ours, name, reference = row
    ours(), reference()
    once = seconds(ours) + seconds(reference)
    rounds = int(min(max(budget / once, 5), 200))
    mine, theirs = np.array([(seconds(ours), seconds(reference)) for _ in range(rounds)]).T
    ratio = np.quantile(theirs / mine, [0.1, 0.5, 0.9])
    return {
        "work": title,
        "beside": name,
        "ms": [round(1e3 * q, 3) for q in np.quantile(mine, [0.1, 0.5, 0.9])],
        "beside_ms": round(1e3 * float(np.median(theirs)), 3),
        "ratio": [round(q, 2) for q in ratio],
        "rounds": rounds,
    }


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| work | ms (10 % to 90 %) | beside | ms | ratio (10 % to 90 %) |"
    yield "|---|---|---|---|---|"
    for row in rows:
        low, middle, high = row["ms"]
        ratios = row["ratio"]
        yield (
            f"| {row['work']} | {middle:.4g} ({low:.4g} to {high:.4g}) | {row['beside']} | {row['beside_ms']:.4g} "
            f"| {ratios[1]:.2f} ({ratios[0]:.2f} to {ratios[2]:.2f}) |"
        )


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write everything measured, to compare commits")
    parser.add_argument("--plot", type=Path, help="write the picture of how time and memory grow")
    parser.add_argument("--only", default="", help="rows with this text in their title; `scaling`: how it grows")
    parser.add_argument(
        "--seconds", type=float, default=10, help="about how long to measure a row; 5 rounds at least (10)"
    )
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument(
        "--against", metavar="COMMIT", help="compare the checkout with a commit instead, on the CPU; takes --only"
    )
    parser.add_argument("--threshold", type=float, default=1.1, help="with --against: fail above this ratio (1.1)")
    arguments = parser.parse_args()
    grows = arguments.only.lower() in ("", "scaling")
    if arguments.against and (arguments.json or arguments.plot):
        parser.error("--against writes no file: leave --json and --plot out")
    if arguments.plot and not grows:
        parser.error(f"--plot is of how time and memory grow, which --only {arguments.only} leaves out")
    if arguments.against:
        raise SystemExit(compare(arguments.against, arguments.only, arguments.threshold))
    torch.set_default_device(arguments.device)
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    result: dict[str, Any] = {"machine": machine()}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), end="\n\n")
    rows = [
        measure(row, arguments.seconds)
        for family in (steps, layers, losses)
        for row in family()
        if arguments.only.lower() in row[0].lower()
    ]
    print("\n".join(table(rows)))
    result["rows"] = rows
    if grows:
        lines = list(scaling())
        print("\n| against | mode | slope of time, log-log | of memory |\n|---|---|---|---|")
        for line in lines:
            print(f"| {line['axis']} | {line['mode']} | {line['slope of ms']} | {line['slope of MB']} |")
        result["scaling"] = lines
        if arguments.plot:
            plot(lines, arguments.plot)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
