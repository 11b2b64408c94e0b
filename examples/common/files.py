"""Files that are there whole or not at all, and where files that can be made again are kept."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a temporary name to write to, renamed to `path` in the end: who reads sees the old file or the new one.

    Args:
        path: The file to make or to replace.
        shared: Whether other processes may be making the same file; then the temporary name is this process's own.
            Otherwise it is always the same, so that what a kill leaves behind is overwritten the next time.
    """
    own = f".{os.getpid()}" if shared else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)  # atomic
    finally:
        temporary.unlink(missing_ok=True)


def cache_directory(given: str | PathLike[str] | None) -> Path:
    """Name the directory of what can be made again: the given one, or `$XDG_CACHE_HOME/setpred`."""
    if given is not None:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "setpred"
