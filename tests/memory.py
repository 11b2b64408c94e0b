"""How much memory a piece of work needs at once."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import profile

from tests import devices


def peak_bytes(run: Callable[[], Any]) -> int:
    """Largest sum of live allocations while ``run`` runs, as PyTorch's allocators count them."""
    run()  # what is allocated once and kept
    if devices.here().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        run()
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    with profile(profile_memory=True, acc_events=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
