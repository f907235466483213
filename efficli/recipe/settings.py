"""`--set key=value`: a value of a recipe from the command line, read and checked as if it were in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from efficli.errors import UsageError
from efficli.strict_yaml import Document, Path, read


def apply_settings(document: Document, settings: Sequence[str]) -> Document:
    """The document with each `key=value` in its place; the last of one key counts.

    A key is a path with dots, and positions from 0 in lists: `exports.0.type=Q8_0`; the position after the last adds
    one. A value is YAML: a word, a number, [a, list]. UsageError that names the setting.
    """
    if document.values is not None and not isinstance(document.values, dict):
        return document  # no recipe at all, which is for its schema to say
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key and equals):
            raise UsageError(f"--set {setting!r}, expected key=value", hint="--set exports.0.type=Q8_0")
        document = _with(document, _path(key), text, f"--set {key}")
    return document


def _with(document: Document, wanted: Path, text: str, name: str) -> Document:
    """The document with what `text` says at a path."""
    value = _value(text, name)
    values, path = _put(document.values or {}, wanted, value.values, name)
    new = {path[:length]: name for length in range(1, len(path)) if path[:length] not in document.lines}
    new |= {path: name} | {(*path, *inside): name for inside in value.lines}
    return replace(
        document,
        values=values,
        lines={at: line for at, line in document.lines.items() if not _inside(at, path)},
        elsewhere={at: place for at, place in document.elsewhere.items() if not _inside(at, path)} | new,
        problems=tuple(problem for problem in document.problems if not _inside(problem.path, path)),
    )


def _inside(path: Path, other: Path) -> bool:
    return path[: len(other)] == other


def _path(key: str) -> Path:
    return tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in key.split("."))


def _value(text: str, name: str) -> Document:
    """What a setting says, with the paths inside; UsageError for what is no YAML."""
    try:
        document = read(text, name)
    except UsageError as error:
        raise UsageError(
            error.message, where=name, hint="put quotes around the value, inside those of the shell: 'key=\"value\"'"
        ) from None
    for problem in document.problems:
        raise UsageError(problem.message, where=name, hint=problem.hint)
    return document


def _put(values: Any, path: Path, value: Any, name: str, own: Path = ()) -> tuple[Any, Path]:
    """`values` with `value` at `path`, and the path as they have it; UsageError where there is no such place."""
    if not path:
        return value, own
    part, rest = path[0], path[1:]
    key = ".".join(map(str, own))
    if isinstance(part, int):
        if isinstance(values, dict) and values and part == 0:
            return _put(values, rest, value, name, own)  # one mapping where a list of them is meant
        items = values if isinstance(values, list) else [values] if values else []
        if part > len(items):
            raise UsageError(f"{key} has {len(items)} of them, expected a position up to {len(items)}", where=name)
        inside, done = _put(items[part] if part < len(items) else None, rest, value, name, (*own, part))
        return [*items[:part], inside, *items[part + 1 :]], done
    if isinstance(values, list):
        hint = f"--set {key}.0.{'.'.join(map(str, path))}=..."
        raise UsageError(f"{key} is a list, expected a position before {part!r}", where=name, hint=hint)
    keys = values if isinstance(values, dict) else {}
    inside, done = _put(keys.get(part), rest, value, name, (*own, part))
    return {**keys, part: inside}, done
