"""What the parts have in common: their command line, and how they hand a row of the table to `tests.cuda`."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
MARK = "ROW "  # a line of a part's output that begins so is a row; all others are its log


class Options(NamedTuple):
    """What `tests.cuda` tells a part."""

    device: str
    seconds: float  # after which it is stopped
    quick: bool
    out: Path  # for pictures
    scratch: Path  # for everything else; it is deleted

    @property
    def arguments(self) -> list[str]:
        """The command line that says the same."""
        given = {name: value for name, value in self._asdict().items() if name != "quick"}
        flags = [flag for name, value in given.items() for flag in (f"--{name}", str(value))]
        return flags + ["--quick"] * self.quick


def row(what: str, value: str, *, beside: str = "", note: str = "", **data: Any) -> None:
    """Hand over a row: what was looked at, what came of it, what it is compared with, and all numbers."""
    print(MARK + json.dumps({"what": what, "value": value, "beside": beside, "note": note} | data), flush=True)


def main(run: Callable[[Options], None]) -> None:
    """Run a part by itself: python -m tests.cuda.PART."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--scratch", type=Path, default=Path("out"))
    options = Options(**vars(parser.parse_args()))
    for folder in (options.out, options.scratch):
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    run(options)
    sys.stdout.flush()
