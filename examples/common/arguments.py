"""What the command lines of the examples are made of: types of options, and which options were given."""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def number(kind: Callable[[str], Any], words: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Make the type of an option: a number that `words` describe."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {words}, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse says "invalid int value"
    return convert


positive = number(float, "positive and finite", lambda x: 0 < x < math.inf)
not_negative = number(float, "at least 0 and finite", lambda x: 0 <= x < math.inf)
fraction = number(float, "at least 0 and less than 1", lambda x: 0 <= x < 1)
count = number(int, "at least 1", lambda n: n >= 1)
whole = number(int, "at least 0", lambda n: n >= 0)
seed = number(int, "at least 0 and less than 2**32", lambda n: 0 <= n < 2**32)


class _Given(argparse.Namespace):
    """Takes no defaults: argparse sets them where a namespace has no such attribute, and this one has all."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


def parse_given(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Parse the options that the command line gives, without defaults."""
    return dict(vars(parser.parse_args(arguments, _Given())))


def flags(names: Iterable[str]) -> str:
    """List options as they are written."""
    return ", ".join("--no-test" if name == "test" else f"--{name.replace('_', '-')}" for name in names)


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as values that checkpoints and JSON files hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """List the options that differ from what they were."""
    pairs = ((name, before.get(name), value) for name, value in plain(now).items())
    return ", ".join(f"{flags([name])} {old} (now {value})" for name, old, value in pairs if old != value)
