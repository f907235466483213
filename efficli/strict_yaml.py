"""Strict YAML: the values, and the line of each; what is ambiguous, repeated or endless is an error with file:line.

Plain scalars follow the core schema of YAML 1.2, so `no` is the word "no" (PyYAML reads False), `1e-3` is a number
(PyYAML reads a word), and `1:30` is a word (PyYAML reads 90). No tags, no merge keys, no numbers that are not finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from efficli.errors import UsageError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_NODES = 10_000
"""Of the expanded document: an alias counts as often as it is used."""

_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip

Path = tuple[str | int, ...]
"""Where a value stands in a document: keys and positions from the root."""


@dataclass(frozen=True, slots=True)
class Document:
    """The values of a YAML file, and the line (from 1) of every value and key by its path."""

    name: str
    values: Any
    lines: dict[Path, int]

    def written(self, path: Path) -> Path:
        """`path` without the positions that the file leaves out, where one item stands for a list of it."""
        own: Path = ()
        for part in path:
            if isinstance(part, str) or (*own, part) in self.lines:
                own = (*own, part)
        return own

    def line(self, path: Path) -> int:
        """The line of `path`, or of the nearest thing around it."""
        path = self.written(path)
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def where(self, path: Path) -> str:
        """`file:line` of `path`."""
        return f"{self.name}:{self.line(path)}"


def parse(text: str, name: str) -> Document:
    """The document in `text`; UsageError with `name:line` for whatever is not plain, finite YAML."""
    if len(text) > MAX_BYTES:
        raise UsageError(f"{len(text)} characters, at most {MAX_BYTES} are read", where=name)
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise UsageError(f"not valid YAML: {error.problem or error.context}", where=f"{name}:{line}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"not valid YAML: {' '.join(str(error).split())}", where=name) from None
    reader = _Reader(name)
    values = None if root is None else reader.value(root, ())
    return Document(name, values, reader.lines)


def is_plain(word: str) -> bool:
    """Whether `word` without quotes is read as this word, not as a number or null."""
    return word not in _WORDS and not any(p.fullmatch(word) for p in (_INTEGER, _NUMBER, _NOT_FINITE))


class _Loader(yaml.BaseLoader):
    """PyYAML's nodes with every plain scalar a word; stops before deep nesting costs time."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """A node and what is inside."""
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"nested more than {MAX_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Reader:
    """Turns nodes into values, and counts what it has seen."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lines: dict[Path, int] = {}
        self.seen = 0

    def error(self, node: yaml.Node, message: str, hint: str | None = None) -> UsageError:
        return UsageError(message, where=f"{self.name}:{node.start_mark.line + 1}", hint=hint)

    def value(self, node: yaml.Node, path: Path) -> Any:
        self.seen += 1
        if len(path) > MAX_DEPTH:
            raise self.error(node, f"nested more than {MAX_DEPTH} deep")
        if self.seen > MAX_NODES:
            raise self.error(node, f"more than {MAX_NODES} values once its aliases are expanded")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            self.plain(node, "map")
            return {key: self.value(item, (*path, key)) for key, item in self.items(node, path)}
        if isinstance(node, yaml.SequenceNode):
            self.plain(node, "seq")
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            raise self.error(node, "expected a value")
        self.plain(node, "str")
        return self.scalar(node) if node.style is None else node.value

    def items(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, yaml.Node]]:
        first: dict[str, int] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error(key, "a key is a list or a mapping, expected a word")
            self.plain(key, "str")
            if key.value == "<<":
                raise self.error(key, "merge keys ('<<') are not read", hint="write the keys out")
            if key.value in first:
                raise self.error(key, f"duplicate key {key.value!r} (first on line {first[key.value]})")
            first[key.value] = key.start_mark.line + 1
            self.lines[(*path, key.value)] = key.start_mark.line + 1
            yield key.value, item

    def plain(self, node: yaml.Node, kind: str) -> None:
        if node.tag not in (f"tag:yaml.org,2002:{kind}", "!"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise self.error(node, f"tag {tag!r} is not read", hint="plain values only are read")

    def scalar(self, node: yaml.ScalarNode) -> Any:
        word: str = node.value
        if word in _WORDS:
            return _WORDS[word]
        if _INTEGER.fullmatch(word) and len(word) <= 40:
            return int(word)
        if _NOT_FINITE.fullmatch(word):
            raise self.error(node, f"{word!r} is not a finite number")
        if _NUMBER.fullmatch(word):
            number = float(word)
            if math.isinf(number):
                raise self.error(node, f"{word!r} is not a finite number")
            return number
        return word
