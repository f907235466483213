"""What code made a result: a hash of a module's source text and of all efficli modules that it imports."""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

_PACKAGE = "efficli"
_CHILDS_WORK = re.compile(r"(efficli(?:\.\w+)+):\w+")
"""How a function that a child process runs is named: "efficli.ops.collect:collect"."""


def package_versions(*names: str) -> dict[str, str | None]:
    """The installed version of each distribution ("torch", "llama-cpp-python"), None for one that is not there."""
    return {name: _version(name) for name in names}


@functools.cache
def source_hash(*modules: str) -> str:
    """SHA-256 in hexadecimal over the source of efficli modules and of every efficli module they import.

    Nothing is imported: the syntax trees tell, and they are read once per process. Followed are imports of modules and
    of names, also inside functions, and functions that are run in a child by name; not those for type checkers only.
    A package's `__init__` counts where something of the package is imported, and then only with what importing it
    loads: a name that it would fetch when first asked for is its public interface and used by nobody here.
    ValueError for a module that does not exist.
    """
    return hash_sources(Path(__file__).resolve().parents[2], modules)


def hash_sources(root: Path, modules: tuple[str, ...]) -> str:
    """As `source_hash`, of the package `efficli` in the folder `root`."""
    digest = hashlib.sha256()
    for name, path in sorted(_closure(root, modules).items()):
        digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _closure(root: Path, modules: tuple[str, ...]) -> dict[str, Path]:
    """Dotted name -> file of the modules, their packages, and everything that these import."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    for name in modules:
        if _file(root, name) is None:
            raise ValueError(f"there is no module {name!r}")
    while waiting:
        name = waiting.pop()
        path = None if name in found else _file(root, name)
        if path is None:
            continue  # known, or a function or class in a module that is followed by its own name
        found[name] = path
        parts = name.split(".")
        waiting += (".".join(parts[:count]) for count in range(1, len(parts)))
        waiting += _imported(path, name)
    return found


def _file(root: Path, name: str) -> Path | None:
    """The source of a dotted name, if it is one of efficli's modules or packages."""
    parts = name.split(".")
    if parts[0] != _PACKAGE or not all(part.isidentifier() for part in parts):
        return None
    place = root.joinpath(*parts)
    for path in (place / "__init__.py", place.with_suffix(".py")):
        if path.is_file():
            return path
    return None


@functools.cache
def _imported(path: Path, name: str) -> tuple[str, ...]:
    """Dotted names that the source may mean by its imports; a name in a module is listed as if it were a module."""
    is_package = path.name == "__init__.py"
    package = name if is_package else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(one for node in _nodes(tree, not is_package) for one in _names(node, package))


def _nodes(tree: ast.AST, functions: bool) -> Iterator[ast.AST]:
    """All nodes but those for type checkers and, unless `functions`, those of function bodies."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not functions:
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from _nodes(other, functions)
            continue
        yield node
        yield from _nodes(node, functions)


def _names(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*above, *([module] if module else [])])
        yield module
        yield from (f"{module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and (called := _CHILDS_WORK.fullmatch(str(node.value))):
        yield called[1]
