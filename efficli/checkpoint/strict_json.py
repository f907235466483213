"""JSON as a checkpoint may contain it: duplicate keys, NaN, infinities and deep nesting are errors with a line."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficli.checkpoint.files import read_bytes
from efficli.errors import CheckpointError

MAX_BYTES = 1 << 28
"""Larger JSON files are refused: the largest tokenizer.json known has 35 MB."""

_CORRECT = "correct it there, or fetch the file again"

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN|-?\d[\d.eE+-]*|[{}\[\]:,]')


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a JSON text: a sentence, the key if a key is duplicate, the line (from 1) if known."""

    message: str
    key: str | None = None
    line: int | None = None


class _DuplicateKeyError(ValueError):
    pass


class _NotFiniteError(ValueError):
    pass


def parse(text: str) -> Any | Fault:
    """The value of a JSON text, or the Fault that it has; never raises, never recurses past the interpreter's limit."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except _DuplicateKeyError as error:
        key = str(error)
        return Fault(f"duplicate key {key!r}", key, _line_of_duplicate(text, key))
    except _NotFiniteError as error:
        return Fault(f"{error} is not a JSON number", None, _line_of_token(text, str(error)))
    except json.JSONDecodeError as error:
        return Fault(f"not valid JSON ({error.msg[0].lower()}{error.msg[1:]})", None, error.lineno)
    except RecursionError:
        return Fault("not valid JSON (nested too deeply)")
    except ValueError as error:  # an integer of more than 4300 digits
        return Fault(f"not valid JSON ({str(error).splitlines()[0][:80]})")


def parse_object(data: bytes, where: str, *, first_line: int | None = None) -> dict[str, Any]:
    """The JSON object in `data`; errors name `where` and the line, counted from `first_line` where it is a part."""
    place = where if first_line is None else f"{where}:{first_line}"
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"not UTF-8 (byte {error.start})", where=place, hint=_CORRECT) from None
    value = parse(text)
    if isinstance(value, Fault):
        if value.line is not None:
            place = f"{where}:{value.line + (first_line or 1) - 1}"
        raise CheckpointError(value.message, where=place, hint=_CORRECT)
    if not isinstance(value, dict):
        raise CheckpointError(f"a JSON {_kind(value)}, expected an object", where=place, hint=_CORRECT)
    return value


def load(path: Path, where: str | None = None) -> dict[str, Any]:
    """The JSON object in the regular file `path`; errors name `where` (default: the file's name) and the line."""
    where = where or path.name
    return parse_object(read_bytes(path, where, MAX_BYTES), where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return out


def _refuse(name: str) -> Any:
    raise _NotFiniteError(name)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _NotFiniteError(digits)
    return value


def _line_of_duplicate(text: str, key: str) -> int | None:
    """The line where an object that already has `key` gets it once more."""
    open_objects: list[set[str] | None] = []
    last: tuple[str, int] | None = None
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "{":
            open_objects.append(set())
        elif token == "[":
            open_objects.append(None)
        elif token in "}]" and open_objects:
            open_objects.pop()
        elif token == ":" and last and open_objects and open_objects[-1] is not None:
            name = json.loads(last[0], strict=False)
            if name in open_objects[-1] and name == key:
                return text.count("\n", 0, last[1]) + 1
            open_objects[-1].add(name)
        last = (token, match.start()) if token.startswith('"') else None
    return None


def _line_of_token(text: str, token: str) -> int | None:
    for match in _TOKEN.finditer(text):
        if match.group() == token:
            return text.count("\n", 0, match.start()) + 1
    return None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names[type(value)]
