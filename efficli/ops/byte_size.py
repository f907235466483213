"""Numbers of bytes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from efficli.errors import UsageError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_WORD = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_bytes(text: str, where: str | None = None) -> int:
    """Bytes of "350MiB", "1.5GB" or "4096": KiB and the like count 1024s, kB and the like 1000s.

    Case does not matter, nor does a space before the unit; a part of a byte is dropped. UsageError for anything else,
    a unit without B included: "4G" may mean either; `where` the text comes from, as --max-bytes, is told.
    """
    found = _WORD.fullmatch(text)
    size = _UNITS.get(found[2].lower()) if found else None
    if found is None or size is None:
        raise UsageError(
            f"{text!r} is not a number of bytes",
            hint="a number and B, kB, MB, GB, TB (1000s) or KiB, MiB, GiB, TiB (1024s), as in 350MiB",
            where=where,
        )
    return int(Fraction(found[1]) * size)


def binary_bytes(count: float) -> str:
    """A size as tables and limits have it, in units of 1024: "5.47 MiB"."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} B"
