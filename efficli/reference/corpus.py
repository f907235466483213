"""The reference checkpoint's text: CPython's standard library and its documentation, split by file.

Code is every ``.py`` file of the running interpreter's standard library that parses and is not a generated
table; prose is every reStructuredText source of Debian's ``python3.11-doc`` (``_sources``). A file belongs to
one slice only, decided by the SHA-256 of its relative path, so that nothing of a held-out file is trained on.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["code", "prose"]
Slice = Literal["train", "calibration", "evaluation"]

DOCUMENTATION = Path("/usr/share/doc/python3.11/html/_sources")
"""Where Debian's python3.11-doc puts the reStructuredText sources."""

GENERATED = ("encodings/cp", "encodings/iso8859", "encodings/mac_", "encodings/koi8", "pydoc_data/topics.py")
"""Tables, and the documentation once more as Python source: neither is code to learn from."""

MAX_FILE_BYTES = 60_000
"""Held-out slices take files up to this size, so that no single one of them is the slice."""


@dataclass(frozen=True, slots=True)
class Document:
    """One source file: where it came from, which slice it belongs to, and its text."""

    name: str
    kind: Kind
    slice: Slice
    text: str


def slice_of(name: str) -> Slice:
    """The slice of a file, from the SHA-256 of its name: 1 in 40 evaluation, 1 in 40 calibration."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 40
    return "evaluation" if bucket == 0 else "calibration" if bucket == 1 else "train"


def _code(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or name.startswith(GENERATED):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue  # test data for the parser itself: not valid Python, or not UTF-8
        if text.strip():
            yield name, text


def _prose(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.txt")):
        yield path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")


def documents(code: Path | None = None, prose: Path | None = None) -> list[Document]:
    """All documents, sorted by name, exact duplicates dropped.

    Raises FileNotFoundError when the documentation package is not installed.
    """
    code = code or Path(sysconfig.get_path("stdlib"))
    prose = prose or DOCUMENTATION
    if not prose.is_dir():
        raise FileNotFoundError(f"{prose}: install python3.11-doc, or pass --prose")
    found: list[Document] = []
    seen: set[str] = set()
    sources: list[tuple[Kind, Iterator[tuple[str, str]]]] = [("code", _code(code)), ("prose", _prose(prose))]
    for kind, files in sources:
        for name, text in files:
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest not in seen:
                seen.add(digest)
                found.append(Document(name, kind, slice_of(f"{kind}/{name}"), text))
    return found


def slice_text(found: list[Document], kind: Kind, part: Slice, max_bytes: int) -> str:
    """The committed text of one held-out slice: whole files in order of their name's hash, up to `max_bytes`."""
    chosen = [d for d in found if d.kind == kind and d.slice == part and len(d.text.encode()) <= MAX_FILE_BYTES]
    chosen.sort(key=lambda d: hashlib.sha256(d.name.encode()).hexdigest())
    out, size = [], 0
    for document in chosen:
        size += len(document.text.encode()) + 1
        if size > max_bytes:
            break
        out.append(document.text)
    return "\n".join(out)
