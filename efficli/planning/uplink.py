"""How long a file takes to a satellite: bytes of a pass, passes, days.

bytes per pass = bits/s on the air / 8 x seconds of a pass x efficiency
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from efficli.errors import UsageError
from efficli.ops.duration import parse_duration
from efficli.target.profile import Link

BUDGET = 3
"""Passes in which a whole reload should be done: what OPS-SAT asked of its software (eoportal.org, OPS-SAT)."""
PASS_S, PASSES_PER_DAY, EFFICIENCY = 480.0, 4.0, 0.7
"""One station under a low Earth orbit; 60 to 70 % of the bits on the air are those of the file (estimates)."""
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_RATE = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]{0,12})?|\.[0-9]{1,12})\s*([kKmMgG]?)(?:bps|bits?/s|b/s)\s*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uplink:
    """A link and its passes."""

    bits_per_s: float
    """On the air."""
    pass_s: float = PASS_S
    passes_per_day: float = PASSES_PER_DAY
    efficiency: float = EFFICIENCY
    """Share of the bits that are the file's."""

    @property
    def bytes_per_s(self) -> float:
        """Of the file."""
        return self.bits_per_s / 8 * self.efficiency

    @property
    def bytes_per_pass(self) -> float:
        """Of the file."""
        return self.bytes_per_s * self.pass_s

    def transfer(self, nbytes: int) -> Transfer:
        """What a file of this size takes."""
        passes = math.ceil(nbytes / self.bytes_per_pass)
        return Transfer(passes=passes, days=passes / self.passes_per_day, in_budget=passes <= BUDGET)

    def to_json(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self) | {
            "bytes_per_s": round(self.bytes_per_s, 1),
            "bytes_per_pass": round(self.bytes_per_pass),
            "bytes_per_day": round(self.bytes_per_pass * self.passes_per_day),
            "bytes_in_3_passes": round(BUDGET * self.bytes_per_pass),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Of a whole file, without repeats of lost passes."""

    passes: int
    days: float
    in_budget: bool
    """At most BUDGET passes."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"passes": self.passes, "days": round(self.days, 2), "within_3_passes": self.in_budget}


def parse_rate(text: str) -> float:
    """Bits a second of "9.6kbps", "256 kbit/s" or "1Mbps"; UsageError for anything else, bytes included."""
    found = _RATE.fullmatch(text)
    if found is None or not float(found[1]):
        raise UsageError(
            f"--uplink {text!r} is not a rate in bits", hint="a number and bps, kbps or Mbps, as in 256kbps"
        )
    return float(found[1]) * _UNITS[found[2].lower()]


def make_uplink(
    link: Link | None, *, rate: float | None = None, pass_s: float | None = None, passes_per_day: float | None = None
) -> Uplink | None:
    """What is asked for, with what is left out from a target's `link` or the usual; None without any rate.

    UsageError for a pass or a number of passes that is not above 0.
    """
    if rate is None and link is None:
        return None
    for what, value in (("--pass", pass_s), ("--passes-per-day", passes_per_day)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{what} {value:g}, expected more than 0")
    made = Uplink(bits_per_s=rate or 0.0)
    if link is not None:
        made = Uplink(
            bits_per_s=rate or link.uplink_kbit_s.value * 1e3,
            pass_s=link.pass_min.value * 60,
            passes_per_day=link.passes_per_day.value,
            efficiency=link.efficiency.value,
        )
    return Uplink(
        bits_per_s=made.bits_per_s,
        pass_s=made.pass_s if pass_s is None else pass_s,
        passes_per_day=made.passes_per_day if passes_per_day is None else passes_per_day,
        efficiency=made.efficiency,
    )


def parse_pass(text: str | None) -> float | None:
    """Seconds of "8min" or "480s"."""
    return None if text is None else parse_duration(text, "--pass")
