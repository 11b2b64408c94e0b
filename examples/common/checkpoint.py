"""What a run leaves in its directory, so that it can be killed at any moment: checkpoints, metrics, JSON files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.files import replacing


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint."""
    with replacing(path) as temporary:
        torch.save(dict(state), temporary)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; it holds tensors and plain values only, so no code is run."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def load_origin(path: Path) -> tuple[str, dict[str, Any]]:
    """Read of a checkpoint only the experiment and the options of its run."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state["experiment"], state["options"]


def load_best(path: Path, experiment: str) -> dict[str, Any]:
    """Read the checkpoint that --evaluate names."""
    if not path.is_file():
        raise SystemExit(f"--evaluate: there is no file {path}")
    try:
        state = load(path)
    except Exception as error:  # whatever the file may hold
        raise SystemExit(f"--evaluate: {path} cannot be read: {str(error).partition(chr(10))[0]}") from None
    if not (isinstance(state, dict) and {"experiment", "options", "model"} <= state.keys()):
        raise SystemExit(f"--evaluate: {path} is no checkpoint of these scripts")
    if state["experiment"] != experiment:
        raise SystemExit(f"--evaluate: {path} is of {state['experiment']}, not {experiment}")
    return state


def write_json(path: Path, value: object) -> None:
    """Write a JSON file."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")


class MetricsFile:
    """Metrics as JSON lines, each with its training step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Write one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Read all whole lines; a kill may have cut the last one short."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def rewind(self, step: int) -> None:
        """Forget what came after a step: training goes on from there."""
        kept = [json.dumps(line) + "\n" for line in self.read() if line["step"] <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept))
