"""The script that checks the release checklist."""

import importlib.util
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "release.py"
spec = importlib.util.spec_from_file_location("release", SCRIPT)
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository that is ready for release 1.2.3."""
    (tmp_path / "setpred").mkdir()
    (tmp_path / "setpred/__init__.py").write_text('__version__ = "1.2.3"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n\n- All.\n")
    (tmp_path / "CITATION.cff").write_text("version: 1.2.3\ndate-released: 2026-01-31\n")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments], cwd=root, check=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "x")


def test_ready(root: Path) -> None:
    assert release.problems(root) == []


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))
        commit(root)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("setpred/__init__.py", "__version__", "version"), "expected a line __version__"),
        (edit("setpred/__init__.py", "1.2.3", "1.2"), "expected a version like 1.2.3"),
        (edit("CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- More.\n"), r"expected nothing under \[Unreleased\]"),
        (edit("CHANGELOG.md", "[1.2.3]", "[1.2.2]"), r"to be \[1.2.3\] - YYYY-MM-DD, found \[1.2.2\]"),
        (edit("CHANGELOG.md", "2026", "9999"), "expected a date that has come, found 9999-01-31"),
        (edit("CITATION.cff", "version: 1.2.3", "version: 1.2.2"), "expected version 1.2.3, found 1.2.2"),
        (edit("CITATION.cff", "date-released: 2026-01-31\n", ""), "expected date-released 2026-01-31, found none"),
        (lambda root: (root / "new").touch(), "expected everything to be committed"),
        (lambda root: git(root, "tag", "v1.2.3"), "expected no tag v1.2.3"),
    ],
)
def test_not_ready(root: Path, change: Callable[[Path], None], message: str) -> None:
    change(root)
    problems = release.problems(root)
    assert any(re.search(message, problem) for problem in problems), problems
