"""CPU seconds of `efficli --help` beside a Typer app with the same commands and options and empty bodies."""

from __future__ import annotations

import ast
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import efficli.cli

RUN = "import sys; from efficli.cli import main; sys.exit(main())"


MODULES = (
    "options", "app", "export", "run", "bench", "attempt", "inspect", "plan", "methods", "recipe_schema", "targets",
    "cache",
)  # fmt: skip


def bare_app() -> str:
    """The source of efficli/cli with the signatures alone: bodies emptied, nothing of efficli imported."""
    folder = Path(efficli.cli.__file__).parent
    found = [node for name in MODULES for node in ast.parse((folder / f"{name}.py").read_text(encoding="utf-8")).body]
    kept: list[ast.stmt] = []
    for node in found:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("efficli", "__future__")):
            continue
        if isinstance(node, ast.FunctionDef) and not node.decorator_list:
            if not node.name.endswith("option"):
                continue
        elif isinstance(node, ast.FunctionDef):
            node.body = [part for part in node.body[:1] if isinstance(part, ast.Expr)] or [ast.Pass()]
            node.returns = None
        elif isinstance(node, ast.If) or (isinstance(node, ast.ClassDef) and not node.name.endswith("Group")):
            continue
        kept.append(node)
    future = ast.parse("from __future__ import annotations").body
    return ast.unparse(ast.Module([*future, *kept], [])) + "\napp()\n"


def cpu_seconds(command: list[str]) -> float:
    """User and system seconds of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "COLUMNS": "100"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert b"Usage" in done.stdout
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(arguments: list[str], pairs: int = 7) -> tuple[float, float, float]:
    """Medians of efficli and of the bare app in seconds, and the median of the ratios of pairs run side by side."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(bare_app(), encoding="utf-8")
        # Compiled like an installed module, as efficli is: a script would be compiled anew in every run.
        start = f"import sys; sys.path.insert(0, {folder!r}); import bare"
        ours, theirs = [], []
        for pair in range(-1, pairs):
            ours.append(cpu_seconds([sys.executable, "-c", RUN, *arguments, "--help"]))
            theirs.append(cpu_seconds([sys.executable, "-c", start, *arguments, "--help"]))
            if pair < 0:  # the first run writes the byte code
                ours.clear()
                theirs.clear()
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return statistics.median(ours), statistics.median(theirs), ratio


if __name__ == "__main__":
    for words in ([], ["export"], ["bench"], ["try"]):
        mine, other, by = compare(words)
        name = " ".join(["efficli", *words, "--help"])
        print(f"{name:22} {mine * 1e3:4.0f} ms, bare Typer {other * 1e3:4.0f} ms, ratio {by:.2f}")
