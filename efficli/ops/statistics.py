"""How sure a handful of repeats makes us: medians with distribution-free intervals, quantiles, shares."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

CONFIDENCE = 0.95
"""What an interval aims at; fewer than six repeats cannot reach it, and say what they do reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The median of `n` repeats, the interval `low`..`high` that covers the true median with `confidence`."""

    n: int
    median: float
    low: float
    high: float
    confidence: float
    mean: float
    stdev: float

    @property
    def spread(self) -> float:
        """How far the interval reaches from the median, as a share of it; infinite for a median of 0 that varies."""
        reach = max(self.high - self.median, self.median - self.low)
        return reach / abs(self.median) if self.median else math.inf if reach else 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def estimate(samples: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The median and its interval: interpolated order statistics (Hettmansperger and Sheather 1986, eq. 2-4).

    Distribution-free for independent repeats. With n < 6 it is the range, whose confidence is 1 - 2 * 2**-n (93.75 %
    for 5); one sample has no interval (confidence 0). ValueError without samples.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    low, high, reached = _interval(ordered, confidence)
    return Estimate(
        n=len(ordered),
        median=statistics.median(ordered),
        low=low,
        high=high,
        confidence=reached,
        mean=statistics.fmean(ordered),
        stdev=statistics.stdev(ordered) if len(ordered) > 1 else 0.0,
    )


def _coverage(n: int, d: int) -> float:
    """How often the d-th smallest to the d-th largest of n repeats cover the median: 1 - 2 P(Binomial(n, 1/2) < d)."""
    return 1.0 - 2.0 * sum(math.comb(n, k) for k in range(d)) / 2.0**n


def _interval(ordered: Sequence[float], confidence: float) -> tuple[float, float, float]:
    n = len(ordered)
    widest = _coverage(n, 1)
    if widest <= confidence:
        return ordered[0], ordered[-1], max(0.0, widest)
    d = 1
    while d + 1 <= n // 2 and _coverage(n, d + 1) >= confidence:
        d += 1
    outer, inner = _coverage(n, d), _coverage(n, d + 1)
    share = (outer - confidence) / (outer - inner)
    # not linear: the distribution between two order statistics is not uniform near the median
    weight = (n - d) * share / (d + (n - 2 * d) * share)
    # in this form no rounding leads beyond equal neighbours
    low = ordered[d - 1] + weight * (ordered[d] - ordered[d - 1])
    high = ordered[n - d] + weight * (ordered[n - d - 1] - ordered[n - d])
    return low, high, confidence


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the ordered values lie, interpolated (Hyndman and Fan's type 7)."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Of `n` durations, in milliseconds."""

    n: int
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, ns: Sequence[int]) -> Self:
        """From nanoseconds; ValueError without any."""
        if not ns:
            raise ValueError("no durations")
        ms = sorted(value / 1e6 for value in ns)
        return cls(n=len(ms), p50=quantile(ms, 0.5), p95=quantile(ms, 0.95), p99=quantile(ms, 0.99))


def share_interval(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: `hits` of `n` requests. (0, 1) without any."""
    if not n:
        return 0.0, 1.0
    share, weight = hits / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    reach = z / (1 + weight) * math.sqrt(share * (1 - share) / n + weight / (4 * n))
    # none and all of them end at 0 and 1 exactly, not a rounding error beside
    return max(0.0, centre - reach) if hits else 0.0, min(1.0, centre + reach) if hits < n else 1.0
