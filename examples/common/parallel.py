"""Independent runs side by side: one process a core, which for small models beats several threads a run."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Run = TypeVar("Run")
Result = TypeVar("Result")


def side_by_side(perform: Callable[[Run, int], Result], runs: Sequence[Run]) -> list[Result]:
    """Call `perform(run, i)` for each run i in processes of their own, as many at once as there are cores."""
    context = multiprocessing.get_context("spawn")
    # One lock for all progress bars, so that they do not write over each other.
    with ProcessPoolExecutor(
        min(os.cpu_count() or 1, len(runs)), context, initializer=tqdm.set_lock, initargs=(context.RLock(),)
    ) as pool:
        return list(pool.map(perform, runs, range(len(runs))))
