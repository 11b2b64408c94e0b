"""The script that makes a release, and what the package index shows of it."""

import datetime
import importlib.util
import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
release = importlib.util.module_from_spec(spec)
spec.loader.exec_module(release)

CHANGELOG = "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- More.\n\n## [1.2.2] - 2026-01-31\n\n- All.\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that is ready for release 1.2.3."""
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "x")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "x@example.org")
    (tmp_path / "setpred").mkdir()
    (tmp_path / ".ci").mkdir()
    (tmp_path / "setpred/__init__.py").write_text('"""Sets."""\n\n__version__ = "1.2.2"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    (tmp_path / "CITATION.cff").write_text("version: 1.2.2\ndate-released: 2026-01-31\nlicense: MIT\n")
    (tmp_path / ".ci/run").write_text("grep -q '\"1.2.3\"' setpred/__init__.py\n")  # it sees the new version
    release.git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def commit(root: Path) -> None:
    release.git(root, "add", "-A")
    release.git(root, "commit", "-q", "-m", "x")


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))
        commit(root)

    return change


def test_ready(root: Path) -> None:
    assert release.problems(root, "1.2.3") == []


@pytest.mark.parametrize("version", ["1.2", "v1.2.3", "1.2.3.dev0"])
def test_version(root: Path, version: str) -> None:
    assert release.problems(root, version) == [f"expected a version like 1.2.3 or 1.2.3rc1, got {version}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("CHANGELOG.md", "- More.", ""), r"expected entries under \[Unreleased\]"),
        (edit("CHANGELOG.md", "## [Unreleased]", "## [1.2.1]"), r"expected entries under \[Unreleased\]"),
        (edit("CHANGELOG.md", "[1.2.2]", "[1.2.3]"), "expected a version after 1.2.3, got 1.2.3"),
        (edit("CHANGELOG.md", "[1.2.2]", "[1.10.0rc1]"), "expected a version after 1.10.0rc1, got 1.2.3"),
        (lambda root: (root / "new").touch(), "expected everything to be committed"),
        (lambda root: release.git(root, "tag", "v1.2.3"), "expected no tag v1.2.3"),
    ],
)
def test_not_ready(
    root: Path, change: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(root)
    head = release.git(root, "rev-parse", "HEAD")
    assert release.main(root, "1.2.3") == 1
    assert re.search(message, capsys.readouterr().out)
    assert release.git(root, "rev-parse", "HEAD") == head


def test_release(root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    built = []
    monkeypatch.setattr(release, "build", built.append)
    assert release.main(root, "1.2.3") == 0
    today = datetime.date.today()
    assert (root / "setpred/__init__.py").read_text() == '"""Sets."""\n\n__version__ = "1.2.3"\n'
    assert (root / "CHANGELOG.md").read_text() == CHANGELOG.replace(
        "## [Unreleased]\n", f"## [Unreleased]\n\n## [1.2.3] - {today}\n"
    )
    assert (root / "CITATION.cff").read_text() == f"version: 1.2.3\ndate-released: {today}\nlicense: MIT\n"
    assert release.git(root, "log", "-1", "--format=%s") == "Release 1.2.3"
    assert release.git(root, "status", "--porcelain") == ""
    assert built == [root]
    assert "git tag v1.2.3 && git push origin HEAD v1.2.3\n  twine upload dist/*" in capsys.readouterr().out


def test_the_first_release_is_dated(root: Path) -> None:
    edit("CITATION.cff", "date-released: 2026-01-31\n", "")(root)
    texts = release.signed_off(root, "1.2.3", datetime.date(2026, 2, 1))
    assert texts[root / "CITATION.cff"] == "version: 1.2.3\ndate-released: 2026-02-01\nlicense: MIT\n"


@pytest.mark.parametrize(("name", "line"), [("setpred/__init__.py", "__version__"), ("CITATION.cff", "version:")])
def test_a_file_without_its_version_is_named(root: Path, name: str, line: str) -> None:
    edit(name, line, "x")(root)
    with pytest.raises(ValueError, match=f"{name}: expected one line like .*, found 0"):
        release.main(root, "1.2.3")
    assert release.git(root, "status", "--porcelain") == ""


def test_what_fails_its_checks_is_left_as_it_was(root: Path) -> None:
    edit(".ci/run", "1.2.3", "1.2.4")(root)
    head = release.git(root, "rev-parse", "HEAD")
    with pytest.raises(subprocess.CalledProcessError):
        release.main(root, "1.2.3")
    assert release.git(root, "rev-parse", "HEAD") == head
    assert release.git(root, "status", "--porcelain") == ""
    assert '"1.2.2"' in (root / "setpred/__init__.py").read_text()


def test_the_index_shows_no_link_into_the_repository() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    text = (ROOT / "README.md").read_text()
    for substitution in settings["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert re.findall(r"\]\((?!https?:).*?\)|\]: (?!https?:).*|(?:src|href)=.*", text) == []
    assert "`examples/quickstart.py`" in text
