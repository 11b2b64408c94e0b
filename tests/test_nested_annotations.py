"""What PyTorch 2.7 cannot trace, to be seen without it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import setpred

FILES = sorted(Path(setpred.__file__).parent.rglob("*.py"))


def nested(tree: ast.AST, inside: bool = False) -> Iterator[ast.FunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if inside and isinstance(node, ast.FunctionDef):
            yield node
        yield from nested(node, inside or isinstance(node, ast.FunctionDef))


def unions(function: ast.FunctionDef) -> list[str]:
    """Its annotations, evaluated whenever the function around it is called, in which types are joined by ``|``."""
    annotations = [
        function.returns,
        *(argument.annotation for argument in ast.walk(function.args) if isinstance(argument, ast.arg)),
    ]
    return [ast.unparse(a) for a in annotations if a and any(isinstance(n, ast.BitOr) for n in ast.walk(a))]


def test_annotations_of_nested_functions_are_not_evaluated() -> None:
    """Its `torch.compile` fails with "Unexpected type in sourceless builder types.UnionType"."""
    seen = 0
    for file in FILES:
        source = file.read_text(encoding="utf-8")
        found = [union for function in nested(ast.parse(source)) for union in unions(function)]
        seen += len(found)
        assert not found or "from __future__ import annotations" in source, (file, found)
    assert seen > 0
