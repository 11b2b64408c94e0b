"""The suite with other versions of what the library stands on: python -m tests.floors FOLDER COMBINATION...

A combination is `lowest` (every dependency and extra at its floor in pyproject.toml), `newest` (what pip
brings), or versions joined by commas, the rest as pip brings it; `PYTHON:` before it names another Python than this.
For each, one after the other: a virtual environment in FOLDER, the library with its test extra, the suite. The table is
printed; FOLDER keeps the logs and floors.json.

    python -m tests.floors /tmp/floors lowest torch==2.9.1 python3.13:newest python3.12:torch==2.11.0,numpy==2.1.0
    python -m tests.floors /tmp/floors lowest --tests tests/losses tests/test_sets.py --keep
    python -m tests.floors --constraints  # the floors, for pip's --constraint
"""

# With pip alone: `uv --resolution lowest-direct` takes the lowest versions that fit together, so that a floor that does
# not fit stays hidden, and it knows nothing of pip's settings, where a machine names its builds of PyTorch. nox and tox
# make environments, three lines here, but neither floors nor a table.

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEPENDENCIES = ["torch", "numpy", "scipy", "typing-extensions"]
COLUMNS = ["Python", *DEPENDENCIES, "others", "passed", "failed", "skipped", "seconds"]


def requirements(pyproject: Path) -> list[str]:
    """What the project and all of its extras require."""
    project = tomllib.loads(pyproject.read_text())["project"]
    return sum(project["optional-dependencies"].values(), project["dependencies"])


def floors(pyproject: Path) -> list[str]:
    """Each requirement `name>=version` as `name==version`."""
    return [requirement.replace(">=", "==") for requirement in requirements(pyproject) if ">=" in requirement]


def install(python: str, versions: str, environment: Path) -> Path:
    """Make the environment, with the library and its test extra in it; return its Python."""
    wanted = {"lowest": floors(ROOT / "pyproject.toml"), "newest": []}.get(versions, versions.split(","))
    constraints = environment.with_name(f"{environment.name}.txt")
    constraints.write_text("\n".join(wanted))
    subprocess.run([python, "-m", "venv", "--clear", environment], check=True)
    inside = environment / "bin/python"
    pip = [inside, "-m", "pip", "install", "--quiet", "--constraint", constraints, "--editable", f"{ROOT}[test]"]
    subprocess.run(pip, check=True)
    return inside


def measure(python: Path, tests: Sequence[str], report: Path, root: Path = ROOT) -> dict[str, Any]:
    """Run the tests of `root` with that Python; return its packages and how the tests ended."""

    def output(*arguments: str) -> str:
        return subprocess.run([python, *arguments], capture_output=True, text=True, check=True).stdout

    packages = {
        re.sub("[-_.]+", "-", package["name"]).lower(): package["version"]
        for package in json.loads(output("-m", "pip", "list", "--format=json"))
    }
    start = time.perf_counter()
    with report.with_suffix(".log").open("w") as log:
        pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        code = subprocess.run(pytest, cwd=root, stdout=log, stderr=subprocess.STDOUT).returncode
    row = {
        "Python": output("--version").split()[1],
        **{name: packages.get(name, "") for name in DEPENDENCIES},
        "seconds": round(time.perf_counter() - start),
        "exit code": code,
        "packages": packages,
    }
    if not report.exists():  # it ended before the first test, or was killed
        return row | {"passed": 0, "failed": "all", "skipped": 0}
    suite = ElementTree.parse(report).getroot()[0]
    tests, failures, errors, skipped = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    failed = failures + errors
    return row | {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results in Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *([str(row.get(name, "")) for name in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("combinations", nargs="*")
    parser.add_argument("--tests", nargs="+", default=[], help="what pytest runs; all by default")
    parser.add_argument("--keep", action="store_true", help="leave the environments: with CUDA, 5 to 7 GB each")
    parser.add_argument("--constraints", action="store_true", help="print the floors, nothing else")
    options = parser.parse_args(arguments)
    if options.constraints:
        print("\n".join(floors(ROOT / "pyproject.toml")))
        return 0
    if not options.combinations:
        parser.error("expected a folder and at least one combination")

    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for combination in options.combinations:
        python, _, versions = combination.rpartition(":")
        environment = folder / re.sub("[^a-z0-9.]+", "-", combination.strip("/"))
        print(f"{combination}:", flush=True)
        try:
            inside = install(python or sys.executable, versions, environment)
            row = measure(inside, options.tests, environment.with_name(f"{environment.name}.xml"))
        except subprocess.CalledProcessError as error:  # what cannot be had is a result too
            row = {"failed": "not installed", "error": str(error), "exit code": 1}
        rows.append({"others": versions if versions == "lowest" else "newest", **row, "combination": combination})
        (folder / "floors.json").write_text(json.dumps(rows, indent=1))
        print(table(rows), flush=True)
        if not options.keep:
            shutil.rmtree(environment, ignore_errors=True)
    return int(any(row["exit code"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
