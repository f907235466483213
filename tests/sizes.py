"""The size ceiling: no long file, no long function, no **kwargs, no module that is a drawer for everything."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
DRAWERS = ("utils", "util", "helpers", "helper", "manager", "base", "common", "misc", "handler")
TABLES_AND_SIGNATURES = {
    "efficli/cli/export.py:export": "a signature with the help of 27 options, and their names once more",
    "efficli/cli/bench.py:bench": "the same of 36",
    "efficli/cli/plan.py:plan": "the same of 19",
    "efficli/cli/quantize.py:quantize": "the same of 27",
    "efficli/pipeline/export.py:export": "the same options, documented",
    "efficli/pipeline/bench.py:bench": "the same options, documented",
    "efficli/recipe/model.py:Recipe.from_export": "the same options, documented",
}
"""Functions that are long because a list of options is; the length of their statements is still checked."""


def findings(root: Path = ROOT) -> Iterator[str]:
    """What is too large or badly named, one line each: `file:line: message`."""
    for folder in ("efficli", "tests", "benchmarks", "scripts"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8")
            lines = text.count("\n")
            if lines > MAX_FILE_LINES:
                yield f"{name}:1: {lines} lines, at most {MAX_FILE_LINES}"
            if folder == "efficli" and path.stem.strip("_").rstrip("0123456789") in DRAWERS:
                yield f"{name}:1: a module called {path.stem!r} has no subject"
            yield from _functions(ast.parse(text), name)


def _functions(tree: ast.Module, name: str, owner: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        inside = f"{owner}{getattr(node, 'name', '')}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = _length(node, f"{name}:{inside}" in TABLES_AND_SIGNATURES)
            if length > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {inside} has {length} lines, at most {MAX_FUNCTION_LINES}"
            if node.args.kwarg and name.startswith("efficli/"):
                yield f"{name}:{node.lineno}: {inside} takes **{node.args.kwarg.arg}"
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _functions(node, name, f"{inside}.")  # type: ignore[arg-type]
        elif list(ast.iter_child_nodes(node)):
            yield from _functions(node, name, owner)  # type: ignore[arg-type]


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef, statements_only: bool) -> int:
    if not statements_only:
        return (node.end_lineno or node.lineno) - node.lineno + 1
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return sum((part.end_lineno or part.lineno) - part.lineno + 1 for part in body)


if __name__ == "__main__":
    found = list(findings())
    print("\n".join(found), file=sys.stderr)
    sys.exit(bool(found))
