"""How time and memory of a decoder grow with each size, the others fixed; slopes on logarithmic axes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from setpred import DSPNDecoder, PooledEncoder, RelationEncoder
from tests.benchmarks.work import Function, seconds
from tests.memory import peak_bytes

MODES = ("unrolled", "implicit", "inference")
MEASURES = {"ms": "ms", "MB": "MB at once"}


class Axis(NamedTuple):
    """One size that grows."""

    encoder: Callable[[int, int, int], nn.Module]
    sizes: list[int]
    decoder: Callable[[int], dict[str, int]]  # batch, set size and inner steps


AXES = {
    "batch": Axis(
        PooledEncoder, [10, 32, 100, 320, 1000, 3200, 10_000], lambda n: {"batch": n, "set_size": 16, "iters": 5}
    ),
    "set size": Axis(
        PooledEncoder, [10, 32, 100, 320, 1000, 3200, 10_000], lambda n: {"batch": 8, "set_size": n, "iters": 5}
    ),
    "set size, pairs": Axis(
        RelationEncoder, [6, 12, 25, 50, 100, 200], lambda n: {"batch": 8, "set_size": n, "iters": 5}
    ),
    "inner steps": Axis(PooledEncoder, [5, 10, 20, 40, 80], lambda n: {"batch": 32, "set_size": 64, "iters": n}),
}


def work(axis: Axis, size: int, mode: str) -> Function:
    """A training step or a decoding."""
    sizes = axis.decoder(size)
    batch = sizes.pop("batch")
    differentiate: Any = "implicit" if mode == "implicit" else "unrolled"
    decoder = DSPNDecoder(axis.encoder(2, 32, 32), channels=2, differentiate=differentiate, **sizes)  # type: ignore[arg-type]
    z = torch.randn(batch, 32)

    def train() -> None:
        decoder(z, record=False).elements.square().sum().backward()

    def decode() -> None:
        with torch.no_grad():
            decoder(z, record=False)

    return decode if mode == "inference" else train


def scaling(rounds: int = 3) -> Iterator[dict[str, Any]]:
    """Measure all modes at all sizes; the slope is that of the upper half, where calling PyTorch costs little."""
    for name, axis in AXES.items():
        times: dict[tuple[str, int], list[float]] = {(mode, size): [] for mode in MODES for size in axis.sizes}
        memory = {}
        for mode, size in times:
            run = work(axis, size, mode)
            memory[mode, size] = peak_bytes(run) / 1e6
            times[mode, size] = [seconds(run) for _ in range(rounds)]
        for mode in MODES:
            line: dict[str, Any] = {"axis": name, "mode": mode, "sizes": axis.sizes}
            line["ms"] = [1e3 * float(np.median(times[mode, size])) for size in axis.sizes]
            line["MB"] = [memory[mode, size] for size in axis.sizes]
            upper = len(axis.sizes) // 2
            for measure in MEASURES:
                slope = np.polyfit(np.log(axis.sizes[upper:]), np.log(line[measure][upper:]), 1)[0]
                line[f"slope of {measure}"] = round(float(slope), 2)
            yield line


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw time above memory, a column for each size."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(MEASURES), len(AXES), figsize=(12, 6), sharex="col", layout="constrained")
    for row, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for panel, axis in zip(row, AXES, strict=True):
            for line in (line for line in lines if line["axis"] == axis):
                slope = line[f"slope of {measure}"]
                panel.loglog(line["sizes"], line[measure], "o-", ms=4, label=f"{line['mode']}: slope {slope:.2f}")
            panel.grid(alpha=0.3)
            panel.legend(frameon=False, fontsize="small")
        row[0].set_ylabel(label)
    for panel, (name, axis) in zip(axes[-1], AXES.items(), strict=True):
        panel.set_xlabel(name)
        panel.set_xticks(axis.sizes[::2], [f"{size:,}" for size in axis.sizes[::2]])
        panel.minorticks_off()
    figure.savefig(path, dpi=130)
