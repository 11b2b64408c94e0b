"""A pytest plugin: every outcome goes into a file at once, and a GPU that no longer answers ends the process.

After an assertion on the device, or an illegal access, every later call fails: the rest is for another process, which
leaves out as many tests as were begun.
"""

import json
import os
from pathlib import Path

import pytest

FILE, DONE = "SETPRED_OUTCOMES", "SETPRED_DONE"  # environment variables

LOST = ("device-side assert", "illegal memory access", "CUDA error: unspecified launch failure", "misaligned address")


class Outcomes:
    """Writes a line of JSON for each test: its name, its outcome, and what went wrong."""

    def __init__(self) -> None:
        self.session: pytest.Session | None = None
        self.file = Path(os.environ[FILE])

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Keep the session."""
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave out what another process has done."""
        del items[: int(os.environ.get(DONE, "0"))]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write that a test begins: it may be the last thing that this process does."""
        self._write({"test": nodeid, "outcome": "begun", "text": ""})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the outcome: of the call, or of what failed or was skipped before it."""
        if report.when == "call" or report.outcome != "passed":
            text = "" if report.passed else report.longreprtext
            self._write({"test": report.nodeid, "outcome": report.outcome, "text": text})
            if report.failed and any(sign in text for sign in LOST) and self.session is not None:
                self.session.shouldstop = "the GPU no longer answers"

    def _write(self, line: dict[str, object]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """Register."""
    config.pluginmanager.register(Outcomes())
