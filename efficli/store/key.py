"""The key of a step's result: a hash of everything that the result depends on, and of nothing else."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

_FORM = 1
"""Changes when an entry is laid out otherwise: results of an older efficli are then computed anew."""


def step_key(kind: str, ingredients: Mapping[str, Any]) -> str:
    """SHA-256 in hexadecimal of a step's kind ("export") and ingredients: everything its result depends on.

    Ingredients are plain data: None, booleans, numbers, strings, lists or tuples (which are the same), mappings with
    strings as keys (in any order). 1 and 1.0 are not the same. TypeError for anything else, a path included: where
    something lies is no part of what it is. ValueError for NaN and infinities.
    """
    if not kind or not kind.isprintable():
        raise ValueError(f"a kind of step is a word, not {kind!r}")
    text = canonical_json({"form": _FORM, "kind": kind, "ingredients": ingredients})
    return hashlib.sha256(text.encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """The one JSON text of plain data: sorted keys, no white space, ASCII."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def plain(value: Any, where: str = "ingredients") -> Any:
    """The value as JSON gives it back: lists for tuples, bare numbers and strings for enums. TypeError, ValueError."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, expected a finite number")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(one, f"{where}[{index}]") for index, one in enumerate(value)]
    if isinstance(value, Mapping):
        if strange := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{where} has the key {strange[0]!r}, expected a string")
        return {str.__str__(key): plain(one, f"{where}.{key}") for key, one in value.items()}
    if isinstance(value, PurePath):
        raise TypeError(f"{where} is the path {value}: a key says what something is, not where")
    raise TypeError(f"{where} is a {type(value).__name__}, expected plain data")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """Dotted names of the ingredients in which two mappings differ, in order: ("config.types", "source")."""
    return tuple(_differences(plain(one), plain(other), ""))


def _differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name in sorted({*one, *other}):
        first, second = one.get(name), other.get(name)
        if name in one and name in other and canonical_json(first) == canonical_json(second):
            continue
        if isinstance(first, dict) and isinstance(second, dict):
            yield from _differences(first, second, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
