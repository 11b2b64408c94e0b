"""Runs of a comparison: trainings side by side, each of which leaves one file of results."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import setpred
from common.arguments import count, positive
from common.checkpoint import write_json
from common.processes import side_by_side
from common.trial import Budget


class Run(NamedTuple):
    """One training."""

    task: str
    decoder: str
    lr: float
    seed: int

    def file(self, out: Path) -> Path:
        """Where its results are."""
        return out / "runs" / f"{self.task}-{self.decoder}-lr{self.lr:g}-seed{self.seed}.json"

    def result(self, out: Path) -> dict[str, Any] | None:
        """What came of it, if it is finished."""
        path = self.file(out)
        return json.loads(path.read_text()) if path.exists() else None

    def write(self, out: Path, budget: Budget, result: dict[str, Any]) -> None:
        """Keep what came of it."""
        about = {"torch": torch.__version__, "setpred": setpred.__version__, "machine": platform.platform()}
        write_json(self.file(out), self._asdict() | {"budget": budget._asdict()} | result | about)


def missing(runs: Iterable[Run], out: Path) -> list[Run]:
    """List the runs, each once, whose results are not there."""
    return [run for run in dict.fromkeys(runs) if not run.file(out).exists()]


def perform_missing(
    runs: Iterable[Run], perform: Callable[[Run, argparse.Namespace], None], options: argparse.Namespace
) -> int:
    """Perform the runs that are not there, each in a process of its own; returns how many failed."""
    todo = missing(runs, options.out)
    if options.quick:  # to start a process takes longer than all that it does
        for run in todo:
            perform(run, options)
        return 0
    return side_by_side([partial(perform, run, options) for run in todo], options.workers)


def best_of(trials: Iterable[Run], out: Path, larger_is_better: bool) -> Run | None:
    """Find the run that is best on validation data at its end, if all are finished."""
    results = {run: run.result(out) for run in trials}
    finals = {run: result["final"] for run, result in results.items() if result is not None}
    if len(finals) < len(results):
        return None
    return (max if larger_is_better else min)(finals, key=lambda run: finals[run])


def add_run_arguments(
    what: argparse._ArgumentGroup, where: argparse._ArgumentGroup, name: str, seconds: Mapping[str, float]
) -> None:
    """Add what all comparisons are told: how much is run, and where results go."""
    what.add_argument("--seeds", type=count, default=3, metavar="N", help="0..N-1 (default: %(default)s)")
    default = ", ".join(f"{value:g} {kind}" for kind, value in seconds.items())
    what.add_argument(
        "--seconds", type=positive, metavar="S", help=f"processor time that a run trains (default: {default})"
    )
    what.add_argument("--quick", action="store_true", help="a few steps on little data: shows that it runs")
    what.add_argument("--report", action="store_true", help="tables and pictures of what is there, no training")
    where.add_argument(
        "--out", type=Path, metavar="DIR", help=f"results (default: out/{name}, with --quick out/{name}-quick)"
    )
    where.add_argument(
        "--workers", type=count, default=os.cpu_count() or 1, metavar="N", help="runs side by side (default: all cores)"
    )


def check_budgets(out: Path, tasks: Collection[str], budget_of: Callable[[str], Budget]) -> None:
    """Refuse results that were made with another budget: they are not comparable."""
    for path in (out / "runs").glob("*.json"):
        before = json.loads(path.read_text())
        if before["task"] in tasks and Budget(**before["budget"]) != budget_of(before["task"]):
            raise SystemExit(f"{path} was made with another --seconds or --quick: give another --out")
