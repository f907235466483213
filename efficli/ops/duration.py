"""Lengths of time as people write them."""

from __future__ import annotations

import re

from efficli.errors import UsageError

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_WORD = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})\s*([a-z]+)\s*", re.ASCII | re.IGNORECASE)


def parse_duration(text: str, where: str | None = None) -> float:
    """Seconds of "30d", "12h", "90 min", "1.5h", "45s", "2w"; UsageError for anything else, a bare number included.

    `where` the text comes from, as --older-than, is told.
    """
    found = _WORD.fullmatch(text)
    size = _UNITS.get(found[2].lower()) if found else None
    if found is None or size is None:
        hint = "a number and s, min, h, d or w, as in 30d or 12h"
        raise UsageError(f"{text!r} is not a length of time", hint=hint, where=where)
    return float(found[1]) * size


def duration_text(seconds: float) -> str:
    """A length of time in its largest whole unit up to days: "45 s", "12 min", "3 h", "30 d"; below zero is "0 s"."""
    for unit in ("d", "h", "min"):
        if seconds >= _UNITS[unit]:
            return f"{seconds // _UNITS[unit]:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
