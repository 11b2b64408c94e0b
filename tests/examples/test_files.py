"""Files that are there whole or not at all."""

from pathlib import Path

import pytest
from common.files import cache_directory, replacing


def test_file_is_the_old_one_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file) as temporary:
        temporary.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def write() -> None:
        with replacing(file) as temporary:
            temporary.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_processes_that_make_the_same_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    with replacing(file, shared=True) as mine:
        mine.write_text("mine")
        monkeypatch.setattr("os.getpid", lambda: -1)
        with replacing(file, shared=True) as theirs:
            theirs.write_text("theirs")
        assert file.read_text() == "theirs"
    assert file.read_text() == "mine"


def test_what_a_kill_left_in_a_run_is_overwritten(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as temporary:
        pass_on = temporary
        temporary.write_text("x")
    with replacing(tmp_path / "file") as temporary:
        assert temporary == pass_on
        temporary.write_text("y")


def test_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory(None) == tmp_path / "setpred"
    assert cache_directory("elsewhere") == Path("elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory(None) == Path.home() / ".cache" / "setpred"
