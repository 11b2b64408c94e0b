"""Beside the published code, in one process, in turn: python -m tests.benchmarks.published DIR [--profile].

DIR holds the modules of https://github.com/Cyanogenoid/dspn (its folder `dspn`), which are no part of this repository:

    git clone https://github.com/Cyanogenoid/dspn /tmp/dspn
    python -m tests.benchmarks.published /tmp/dspn/dspn
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from setpred import HungarianLoss
from tests.benchmarks.__main__ import machine
from tests.benchmarks.work import BATCH, Clevr, Function, Mnist, infer, seconds


class Published:
    """The published networks and losses on the same shapes as ours."""

    def __init__(self, pool: Any) -> None:
        sys.modules.setdefault("torchvision", ModuleType("torchvision"))  # only its image encoder uses it
        self.utils, self.model, self.dspn = (import_module(name) for name in ("utils", "model", "dspn"))
        self.pool = pool

    def decoder(self, work: Clevr | Mnist) -> torch.nn.Module:
        """Make the decoder of one of the two shapes."""
        if isinstance(work, Clevr):
            decoder = self.dspn.DSPN(self.model.RNFSEncoder(18, 512, 512), 18, 10, 512, 10, 800)
        else:
            decoder = self.dspn.DSPN(self.model.FSEncoder(2, 64, 256), 2, 342, 256, 10, 800)
        return decoder  # type: ignore[no-any-return]

    def train(self, work: Clevr | Mnist) -> Function:
        """Make a training step: forward, loss, backward."""
        decoder = self.decoder(work)
        target, mask = work.target.mT.contiguous(), work.mask.float()
        wanted = torch.cat([target, mask.unsqueeze(1)], 1)

        def step() -> None:
            decoder.zero_grad()
            represented = decoder.encoder(target, mask)
            z = work.z if isinstance(work, Clevr) else represented
            sets, masks, _, _ = decoder(z)
            found = [torch.cat([x, m.unsqueeze(1)], 1) for x, m in zip(sets, masks, strict=True)]
            if isinstance(work, Clevr):
                loss = self.utils.hungarian_loss(found[-1], wanted, self.pool)
                loss = loss + 0.1 * F.smooth_l1_loss(represented, z)
            else:
                loss = self.utils.chamfer_loss(torch.stack(found), wanted.unsqueeze(0)).mean()
            loss.backward()

        return step

    def infer(self, work: Clevr | Mnist) -> Function:
        """Make an inference."""
        decoder = self.decoder(work).eval()

        def run() -> None:
            with torch.no_grad():
                decoder(work.z.detach())

        return run


def rows(published: Published) -> Iterator[tuple[str, dict[str, Function]]]:
    """Yield what is compared: a title, and the functions that run in turn, the published one first."""
    for work in (Clevr, Mnist):
        ours = {mode: work(mode) for mode in ("unrolled", "implicit")}
        step = {"published": published.train(ours["unrolled"])}
        yield f"{work.__name__}: training step", step | {mode: one.train for mode, one in ours.items()}
        both = {"published": published.infer(ours["unrolled"]), "setpred": infer(work("unrolled"))}
        yield f"{work.__name__}: inference", both

    pred, mask = torch.rand(BATCH, 10, 18, requires_grad=True), torch.rand(BATCH, 10, requires_grad=True)
    target_mask = torch.rand(BATCH, 10) < 0.6
    target = torch.rand(BATCH, 10, 18) * target_mask.unsqueeze(-1)
    loss = HungarianLoss()

    def theirs() -> None:
        found = torch.cat([pred, mask.unsqueeze(-1)], -1).mT
        wanted = torch.cat([target, target_mask.unsqueeze(-1)], -1).mT
        published.utils.hungarian_loss(found, wanted, published.pool).backward()

    ours = {"published": theirs, "setpred": lambda: loss(pred, target, mask, target_mask).backward()}
    yield "Hungarian loss 32 x 10 x 19, forward and backward", ours


def shares(function: Function, least: float = 0.03) -> str:
    """List the operators that take most of the time of their own."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        function()
    times = {event.key: event.self_cpu_time_total for event in run.key_averages()}
    total = sum(times.values())
    largest = sorted(times.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {time / total:.0%}" for name, time in largest if time >= least * total)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.published")
    parser.add_argument("code", type=Path, metavar="DIR", help="folder with the published dspn.py, model.py, utils.py")
    parser.add_argument("--rounds", type=int, default=7, help="of the steps; of the loss 40 times as many")
    parser.add_argument("--profile", action="store_true", help="list the operators that take at least 3 %% of the time")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    print(", ".join(f"{key} {value}" for key, value in machine().items()), end="\n\n")
    print("| work | | ms (10 % to 90 %) | times faster (10 % to 90 %) |\n|---|---|---|---|")
    profiles = []
    sys.path.insert(0, str(arguments.code))  # of the pool's processes too
    with multiprocessing.Pool(4) as pool:  # as published
        for title, functions in rows(Published(pool)):
            for function in functions.values():
                function()
            rounds = arguments.rounds * (40 if "loss" in title else 1)
            times = np.array([[seconds(function) for function in functions.values()] for _ in range(rounds)]).T
            for name, own in zip(functions, times, strict=True):
                low, middle, high = 1e3 * np.quantile(own, [0.1, 0.5, 0.9])
                least, ratio, most = np.quantile(times[0] / own, [0.1, 0.5, 0.9])
                print(
                    f"| {title} | {name} | {middle:.4g} ({low:.4g} to {high:.4g}) "
                    f"| {ratio:.2f} ({least:.2f} to {most:.2f}) |",
                    flush=True,
                )
                if arguments.profile:
                    profiles.append(f"- {title}, {name}: {shares(functions[name])}")
    if profiles:
        print("\nTime of the operators' own:", *profiles, sep="\n")


if __name__ == "__main__":
    main()
