"""Jobs side by side, each in a process of its own."""

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

Job = Callable[[], None]


def side_by_side(jobs: Sequence[Job], workers: int) -> int:
    """Do jobs that can be pickled, so many at a time; returns how many failed."""
    context = multiprocessing.get_context("spawn")

    def in_process(job: Job) -> bool:
        process = context.Process(target=_alone, args=(job,), daemon=True)
        process.start()
        process.join()
        return process.exitcode == 0

    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(in_process, jobs)).count(False)
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _alone(job: Job) -> None:
    """Do a job as what a process does; Ctrl-C is for its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job()
