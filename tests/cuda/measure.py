"""Times and memory of one piece of work, and the rows that say them."""

import time
from typing import NamedTuple

import numpy as np
import torch

from tests.benchmarks.work import Function, seconds, wait

BLOCK = 0.05  # seconds; so long the GPU is given work before it is waited for


class Cost(NamedTuple):
    """Milliseconds of a call: 10 % quantile, median, 90 %; and the most memory that it took, in MiB, on a GPU."""

    ms: tuple[float, float, float]
    mib: float | None

    def __str__(self) -> str:
        low, middle, high = self.ms
        return f"{middle:.4g} ms ({low:.4g} to {high:.4g})"

    @property
    def memory(self) -> str:
        """For the notes."""
        return "" if self.mib is None else f"{self.mib:.0f} MiB"


def measure(function: Function, budget: float) -> Cost:
    """Call it for so many seconds, in blocks long enough that the processor may run ahead, as in training."""
    function(), function()
    once = seconds(function)
    calls = max(int(BLOCK / once), 1)
    mib = peak(function)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        times.append(1e3 * (time.perf_counter() - start) / calls)
    low, middle, high = (float(q) for q in np.quantile(times, [0.1, 0.5, 0.9]))
    return Cost((low, middle, high), mib)


def peak(function: Function) -> float | None:
    """Memory, in MiB, that the call takes beside what was there before."""
    if not torch.cuda.is_initialized():
        return None
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    wait()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
