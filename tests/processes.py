"""Two processes of one process group, for the tests of distributed training."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_in_two_processes(work: Callable[..., None], folder: Path, *args: Any) -> None:
    """Run `work(rank, folder, *args)` in both; what it returns has to be written into the folder."""
    torch.multiprocessing.spawn(_run, args=(work, folder, *args), nprocs=2)


def _run(rank: int, work: Callable[..., None], folder: Path, *args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    work(rank, folder, *args)
    dist.barrier()
    # Without the interpreter's finalisation: gloo's threads may still hold tensors and then ask for its lock, which
    # aborts the process now and then (https://github.com/pytorch/pytorch/pull/179291), all work done.
    os._exit(0)
