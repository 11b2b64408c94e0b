"""A snapshot of the public API: names, signatures and defaults cannot change unnoticed.

python -m tests.test_api_snapshot writes tests/api.txt anew.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path

SNAPSHOT = Path(__file__).with_name("api.txt")
MODULES = ["setpred", "setpred.functional", "setpred.metrics", "setpred.export", "setpred.plot"]


def signature(of: object) -> str:
    """Arguments with their kinds and defaults; types are checked by mypy and would differ between versions."""
    arguments = inspect.signature(of)  # type: ignore[arg-type]
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in arguments.parameters.values()]
    text = str(arguments.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    return re.sub(r"<function (\w+) at \w+>", r"\1", text)


def describe(name: str, thing: object) -> Iterator[str]:
    if not inspect.isclass(thing):
        yield name + (signature(thing) if callable(thing) else "")
        return
    fields = getattr(thing, "_fields", None)
    yield f"class {name}" + (f"({', '.join(fields)})" if fields else signature(thing))
    ours = [base for base in thing.__mro__ if base.__module__.startswith("setpred")]
    methods = {name for base in ours for name, value in vars(base).items() if inspect.isroutine(value)}
    for method in sorted(methods - {"extra_repr", *(fields or ())}):
        if not method.startswith("_"):
            yield f"    {method}{signature(getattr(thing, method))}"


def snapshot() -> str:
    lines: list[str] = []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        lines.append(f"# {module_name}")
        for name in sorted(module.__all__):
            thing = getattr(module, name)
            if not inspect.ismodule(thing):
                lines += describe(f"{module_name}.{name}", thing)
    return "\n".join(lines) + "\n"


def test_public_api_is_as_written_down() -> None:
    difference = "\n".join(unified_diff(SNAPSHOT.read_text().splitlines(), snapshot().splitlines(), lineterm="", n=0))
    assert not difference, (
        f"The public API has changed:\n{difference}\n"
        "If that is meant: say it in CHANGELOG.md (users must know, and a removal or a changed default needs a new "
        "minor version before 1.0, a new major one after), then run python -m tests.test_api_snapshot"
    )


if __name__ == "__main__":
    SNAPSHOT.write_text(snapshot())
