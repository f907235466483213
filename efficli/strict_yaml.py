"""Strict YAML: the values, and the line of each; what is ambiguous, repeated or endless is an error with file:line.

Every error of a file is found at once, but for those after which the rest cannot be told: its syntax, its size.

Plain scalars follow the core schema of YAML 1.2, so `no` is the word "no" (PyYAML reads False), `1e-3` is a number
(PyYAML reads a word), and `1:30` is a word (PyYAML reads 90). No tags, no merge keys, no numbers that are not finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
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
class Problem:
    """Something wrong with a document: at which path, and what to do."""

    path: Path
    message: str
    hint: str | None = None
    line: int | None = None
    """Where it is, if that is not the line of the path."""
    lost: bool = False
    """Whether the value at the path could not be read."""


@dataclass(frozen=True, slots=True)
class Document:
    """The values of a YAML file, and the line (from 1) of every value and key by its path."""

    name: str
    values: Any
    lines: Mapping[Path, int]
    problems: tuple[Problem, ...] = ()
    """What was wrong with the YAML."""
    elsewhere: Mapping[Path, str] = field(default_factory=dict)
    """Where values come from that are not in the file: `--set model`."""

    def written(self, path: Path) -> Path:
        """`path` without the positions that the file leaves out, where one item stands for a list of it."""
        own: Path = ()
        for part in path:
            if isinstance(part, str) or (*own, part) in self.lines or (*own, part) in self.elsewhere:
                own = (*own, part)
        return own

    def line(self, path: Path) -> int:
        """The line of `path`, or of the nearest thing around it."""
        path = self.written(path)
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def where(self, path: Path) -> str:
        """`file:line` of `path`, or what else its value comes from."""
        path = self.written(path)
        for length in range(len(path), 0, -1):
            if path[:length] in self.elsewhere:
                return self.elsewhere[path[:length]]
            if path[:length] in self.lines:
                break
        return f"{self.name}:{self.line(path)}"

    def error(self, problems: Sequence[Problem]) -> UsageError:
        """All problems, in the order of their lines, as one error."""
        found: dict[str, tuple[tuple[float, int], UsageError]] = {}
        order = {path: place for place, path in enumerate((*self.lines, *self.elsewhere))}
        for problem in problems:
            where = f"{self.name}:{problem.line}" if problem.line else self.where(problem.path)
            line = (problem.line or self.line(problem.path)) if where.startswith(f"{self.name}:") else math.inf
            message = problem.message.removeprefix(f"{where.removeprefix('--set ')}: ")  # the place says it already
            error = UsageError(message, where=where if self.name else None, hint=problem.hint)
            found.setdefault(error.line, ((line, order.get(self.written(problem.path), 0)), error))
        first, *rest = [error for _, error in sorted(found.values(), key=itemgetter(0))]
        return UsageError(first.message, where=first.where, hint=first.hint, others=rest)


def parse(text: str, name: str) -> Document:
    """The document in `text`; UsageError with `name:line` for whatever is not plain, finite YAML."""
    document = read(text, name)
    if document.problems:
        raise document.error(document.problems)
    return document


def read(text: str, name: str) -> Document:
    """The document in `text` with its `problems`; UsageError for those after which nothing can be read."""
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
    return Document(name, values, reader.lines, tuple(reader.problems))


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
        self.problems: list[Problem] = []
        self.seen = 0

    def problem(
        self, node: yaml.Node, path: Path, message: str, hint: str | None = None, *, lost: bool = False
    ) -> None:
        """Note what is wrong and go on."""
        self.problems.append(Problem(path, message, hint, node.start_mark.line + 1, lost))

    def end(self, node: yaml.Node, message: str) -> UsageError:
        """What is endless is not read on."""
        return UsageError(message, where=f"{self.name}:{node.start_mark.line + 1}")

    def value(self, node: yaml.Node, path: Path) -> Any:
        """What a node says; None where that is a problem."""
        self.seen += 1
        if len(path) > MAX_DEPTH:
            raise self.end(node, f"nested more than {MAX_DEPTH} deep")
        if self.seen > MAX_NODES:
            raise self.end(node, f"more than {MAX_NODES} values once its aliases are expanded")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            if not self.is_plain(node, path, "map"):
                return None
            return {key: self.value(item, (*path, key)) for key, item in self.items(node, path)}
        if isinstance(node, yaml.SequenceNode):
            if not self.is_plain(node, path, "seq"):
                return None
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            raise self.end(node, "expected a value")
        if not self.is_plain(node, path, "str"):
            return None
        return self.scalar(node, path) if node.style is None else node.value

    def items(self, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, yaml.Node]]:
        """Keys and their nodes; of a key that is there twice the first."""
        first: dict[str, int] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.problem(key, path, "a key is a list or a mapping, expected a word")
            elif not self.is_plain(key, (*path, key.value), "str"):
                continue
            elif key.value == "<<":
                self.problem(key, (*path, "<<"), "merge keys ('<<') are not read", "write the keys out")
            elif key.value in first:
                message = f"duplicate key {key.value!r} (first on line {first[key.value]})"
                self.problem(key, (*path, key.value), message)
            else:
                first[key.value] = key.start_mark.line + 1
                self.lines[(*path, key.value)] = key.start_mark.line + 1
                yield key.value, item

    def is_plain(self, node: yaml.Node, path: Path, kind: str) -> bool:
        """Whether a node has no tag."""
        if node.tag in (f"tag:yaml.org,2002:{kind}", "!"):
            return True
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        self.problem(node, path, f"tag {tag!r} is not read", "plain values only are read", lost=True)
        return False

    def scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        """A word without quotes: null, a truth value, a number, or itself."""
        word: str = node.value
        if word in _WORDS:
            return _WORDS[word]
        if _INTEGER.fullmatch(word) and len(word) <= 40:
            return int(word)
        number = float(word) if _NUMBER.fullmatch(word) else math.nan
        if _NOT_FINITE.fullmatch(word) or math.isinf(number):
            self.problem(node, path, f"{word!r} is not a finite number", lost=True)
            return None
        return word if math.isnan(number) else number
