"""Runs of a comparison: trainings side by side, each of which leaves one file of results."""

import argparse
import json
import platform
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import setpred
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


def check_budgets(out: Path, tasks: Collection[str], budget_of: Callable[[str], Budget]) -> None:
    """Refuse results that were made with another budget: they are not comparable."""
    for path in (out / "runs").glob("*.json"):
        before = json.loads(path.read_text())
        if before["task"] in tasks and Budget(**before["budget"]) != budget_of(before["task"]):
            raise SystemExit(f"{path} was made with another --seconds or --quick: give another --out")
