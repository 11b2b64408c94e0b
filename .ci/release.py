"""Make a release: python .ci/release.py 1.2.3. It checks, signs off, builds into dist/, and says what is left to do."""

import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]
UNRELEASED = "## [Unreleased]\n"
LEFT = """
Built, and committed here alone. Left to do by hand:

  git show                                 # is this the release?
  git tag v{version} && git push origin HEAD v{version}
  twine upload dist/*
"""


def problems(root: Path, version: str) -> list[str]:
    """What speaks against the release, in words."""
    found = []
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        return [f"expected a version like 1.2.3 or 1.2.3rc1, got {version}"]

    changelog = (root / "CHANGELOG.md").read_text()
    unreleased, *released = re.split(r"^## ", changelog, flags=re.M)[1:] or [""]
    if not unreleased.startswith("[Unreleased]\n") or "- " not in unreleased:
        found.append("CHANGELOG.md: expected entries under [Unreleased], at its top, found none")
    if released and (newest := re.match(r"\[(.+?)\]", released[0])) and Version(version) <= Version(newest[1]):
        found.append(f"CHANGELOG.md: expected a version after {newest[1]}, got {version}")

    if changed := git(root, "status", "--porcelain"):
        found.append(f"git: expected everything to be committed, found\n{changed}")
    if git(root, "tag", "--list", f"v{version}"):
        found.append(f"git: expected no tag v{version} yet, found one")
    return found


def signed_off(root: Path, version: str, date: datetime.date) -> dict[Path, str]:
    """The files that name the version, as they read with it."""
    citation = re.sub(r"^date-released: .*\n", "", (root / "CITATION.cff").read_text(), flags=re.M)
    edits = {
        "setpred/__init__.py": (None, r'^__version__ = ".*"$', f'__version__ = "{version}"'),
        "CHANGELOG.md": (None, re.escape(UNRELEASED), f"{UNRELEASED}\n## [{version}] - {date}\n"),
        "CITATION.cff": (citation, r"^version: .*$", f"version: {version}\ndate-released: {date}"),
    }
    texts = {}
    for name, (text, pattern, new) in edits.items():
        texts[root / name], count = re.subn(pattern, new, text or (root / name).read_text(), flags=re.M)
        if count != 1:
            raise ValueError(f"{name}: expected one line like {pattern}, found {count}")
    return texts


def git(root: Path, *arguments: str) -> str:
    """What git says there."""
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def check(root: Path) -> None:
    """All that must pass before anything lands."""
    subprocess.run(["bash", ".ci/run"], cwd=root, check=True)


def build(root: Path) -> None:
    """Build the committed tree as .ci/run does."""
    shutil.rmtree(root / "dist", ignore_errors=True)
    environment = os.environ | {"SOURCE_DATE_EPOCH": git(root, "log", "-1", "--format=%ct")}
    subprocess.run([sys.executable, "-m", "build"], cwd=root, env=environment, check=True)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *(root / "dist").iterdir()], check=True)


def main(root: Path, version: str) -> int:
    """Release, or leave everything as it was."""
    if found := problems(root, version):
        print("\n".join(found))
        return 1
    texts = signed_off(root, version, datetime.date.today())
    try:
        for path, text in texts.items():
            path.write_text(text)
        check(root)
        git(root, "commit", "--quiet", "--all", "--message", f"Release {version}")
    except BaseException:
        git(root, "checkout", "--quiet", "HEAD", "--", *map(str, texts))
        raise
    build(root)
    print(LEFT.format(version=version))
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(ROOT, sys.argv[1]))
