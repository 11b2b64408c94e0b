"""Check that a release is ready: python .ci/release.py. The list is docs/contributing.md's; nothing is published."""

import datetime
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(root: Path) -> list[str]:
    """What is not ready, in words."""
    found = []
    version = re.search(r'__version__ = "(.+?)"', (root / "setpred/__init__.py").read_text())
    if version is None:
        return ['setpred/__init__.py: expected a line __version__ = "...", found none']
    number = version[1]
    if not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", number):
        found.append(f"setpred/__init__.py: expected a version like 1.2.3 or 1.2.3rc1, found {number}")

    changelog = (root / "CHANGELOG.md").read_text()
    sections = re.split(r"^## ", changelog, flags=re.M)[1:]
    titles = [section.splitlines()[0] for section in sections]
    if sections and titles[0] == "[Unreleased]":
        if "- " in sections.pop(0):
            found.append("CHANGELOG.md: expected nothing under [Unreleased], found entries: move them to the release")
        titles.pop(0)
    newest = titles[0] if titles else "none"
    match = re.fullmatch(r"\[(.+)\] - (\d{4}-\d{2}-\d{2})", newest)
    if match is None or match[1] != number:
        found.append(f"CHANGELOG.md: expected the newest section to be [{number}] - YYYY-MM-DD, found {newest}")
    elif datetime.date.fromisoformat(match[2]) > datetime.date.today():
        found.append(f"CHANGELOG.md: expected a date that has come, found {match[2]}")

    citation = (root / "CITATION.cff").read_text()
    expected = {"version": number} | ({"date-released": match[2]} if match else {})
    for key, value in expected.items():
        line = re.search(rf"^{key}: [\"']?(.+?)[\"']?$", citation, flags=re.M)
        if line is None or line[1] != value:
            found.append(f"CITATION.cff: expected {key} {value}, found {line[1] if line else 'none'}")

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    if changed := git("status", "--porcelain"):
        found.append(f"git: expected everything to be committed, found\n{changed}")
    if git("tag", "--list", f"v{number}"):
        found.append(f"git: expected no tag v{number} yet, found one")
    return found


if __name__ == "__main__":
    not_ready = problems(ROOT)
    print("\n".join(not_ready) or "Ready: tag it, build it, check it, publish it.")
    sys.exit(bool(not_ready))
