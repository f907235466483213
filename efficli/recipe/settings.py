"""`--set key=value`: a value of a recipe from the command line, read and checked as if it were in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from efficli.errors import UsageError
from efficli.strict_yaml import Document, Path, read

Place = TypeVar("Place", int, str)


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


def _with(document: Document, path: Path, text: str, name: str) -> Document:
    """The document with what `text` says at a path."""
    value = _value(text, name)
    for length, part in enumerate(path):
        if isinstance(part, int):
            document = _as_list(document, path[:length])
    values = _put(document.values or {}, path, value.values, name)
    new = {path[:length]: name for length in range(1, len(path)) if path[:length] not in document.lines}
    new = {at: place for at, place in new.items() if at not in document.elsewhere}
    new |= {path: name} | {(*path, *inside): name for inside in value.lines}
    return replace(
        document,
        values=values,
        lines={at: line for at, line in document.lines.items() if not _inside(at, path)},
        elsewhere={at: place for at, place in document.elsewhere.items() if not _inside(at, path)} | new,
        problems=tuple(problem for problem in document.problems if not _inside(problem.path, path)),
    )


def _as_list(document: Document, path: Path) -> Document:
    """The document with a list at a path where there is one item that stands for a list of it."""
    found = document.values
    for part in path:
        if isinstance(found, list) and isinstance(part, int) and part < len(found):
            found = found[part]
        else:
            found = found.get(part) if isinstance(found, dict) else None
    if found is None or found == {} or isinstance(found, list):
        return document

    def moved(at: Path) -> Path:
        return (*path, 0, *at[len(path) :]) if _inside(at, path) else at

    def placed(places: Mapping[Path, Place]) -> dict[Path, Place]:
        return {moved(at): place for at, place in places.items()} | {at: places[at] for at in [path] if at in places}

    return replace(
        document,
        values=_put(document.values, path, [found], ""),
        lines=placed(document.lines),
        elsewhere=placed(document.elsewhere),
        problems=tuple(replace(problem, path=moved(problem.path)) for problem in document.problems),
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


def _put(values: Any, path: Path, value: Any, name: str, own: Path = ()) -> Any:
    """`values` with `value` at `path`; UsageError where there is no such place."""
    if not path:
        return value
    part, rest = path[0], path[1:]
    key = ".".join(map(str, own))
    if isinstance(part, int):
        items = values if isinstance(values, list) else []
        if part > len(items):
            raise UsageError(f"{key} has {len(items)} of them, expected a position up to {len(items)}", where=name)
        inside = _put(items[part] if part < len(items) else None, rest, value, name, (*own, part))
        return [*items[:part], inside, *items[part + 1 :]]
    if isinstance(values, list):
        hint = f"--set {key}.0.{'.'.join(map(str, path))}=..."
        raise UsageError(f"{key} is a list, expected a position before {part!r}", where=name, hint=hint)
    keys = values if isinstance(values, dict) else {}
    return {**keys, part: _put(keys.get(part), rest, value, name, (*own, part))}
