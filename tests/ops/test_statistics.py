"""Intervals of a median, quantiles and shares, against slow definitions that share no formula with them."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficli.ops.statistics import CONFIDENCE, _coverage, estimate, quantile, share_interval


def covered(n: int, d: int) -> float:
    """How often the d-th smallest to the d-th largest hold the median: all 2**n ways to fall below or above it."""
    hits = sum(d <= sum(below) <= n - d for below in itertools.product((0, 1), repeat=n))
    return hits / 2**n


@pytest.mark.parametrize("n", range(2, 15))
def test_coverage_is_the_count_of_all_outcomes(n):
    for d in range(1, n // 2 + 1):
        assert _coverage(n, d) == pytest.approx(covered(n, d), abs=1e-12)


@pytest.mark.parametrize(("n", "confidence"), [(2, 0.5), (3, 0.75), (4, 0.875), (5, 0.9375)])
def test_few_repeats_give_their_range_and_say_what_it_is_worth(n, confidence):
    found = estimate([float(i * i) for i in range(n)])
    assert (found.low, found.high, found.confidence) == (0, (n - 1) ** 2, confidence)
    assert confidence == covered(n, 1)


def test_one_repeat_has_no_interval():
    found = estimate([3.5])
    assert (found.n, found.median, found.low, found.high, found.confidence, found.stdev) == (1, 3.5, 3.5, 3.5, 0.0, 0.0)


def test_no_repeat_is_an_error():
    with pytest.raises(ValueError, match="no samples"):
        estimate([])


@pytest.mark.parametrize("n", range(6, 31))
def test_the_interval_lies_between_the_two_that_order_statistics_give(n):
    """The exact interval that covers too much holds it, and it holds the next one, which covers too little."""
    ordered = sorted(float(x) for x in np.random.default_rng(n).lognormal(size=n))
    found = estimate(ordered)
    d = max(d for d in range(1, n // 2 + 1) if _coverage(n, d) >= CONFIDENCE)
    assert found.confidence == CONFIDENCE
    assert ordered[d - 1] <= found.low <= ordered[d]
    assert ordered[n - d - 1] <= found.high <= ordered[n - d]


@pytest.mark.parametrize("n", [6, 9, 10, 20, 30])
@pytest.mark.parametrize("shape", ["normal", "laplace", "exponential", "uniform"])
def test_the_interval_covers_the_median_as_often_as_it_says(n, shape):
    """Hettmansperger and Sheather's interpolation, which ignores the shape of the distribution, by simulation."""
    rounds = 3000
    random = np.random.default_rng(20 + n)
    median = {"exponential": math.log(2), "uniform": 0.5}.get(shape, 0.0)
    samples = getattr(random, shape)(size=(rounds, n)).tolist()
    hits = sum(found.low <= median <= found.high for found in map(estimate, samples))
    noise = 3 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / rounds)
    assert CONFIDENCE - 0.01 - noise <= hits / rounds <= CONFIDENCE + 0.015 + noise


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.99])
def test_other_confidences_are_reached(confidence):
    random, rounds, n = np.random.default_rng(5), 3000, 15
    hits = sum(
        f.low <= 0 <= f.high for f in (estimate(row.tolist(), confidence) for row in random.normal(size=(rounds, n)))
    )
    assert hits / rounds == pytest.approx(confidence, abs=3 * math.sqrt(confidence * (1 - confidence) / rounds) + 0.01)


def test_a_wider_confidence_is_a_wider_interval():
    samples = np.random.default_rng(1).normal(size=25).tolist()
    widths = [f.high - f.low for f in (estimate(samples, c) for c in (0.5, 0.8, 0.9, 0.95, 0.99, 0.999))]
    assert widths == sorted(widths) and widths[0] < widths[-1]


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=40))
def test_an_estimate_is_in_order_and_that_of_the_standard_library(samples):
    found = estimate(samples)
    assert min(samples) <= found.low <= found.median <= found.high <= max(samples)
    assert found.median == statistics.median(samples) and found.n == len(samples)
    assert found.mean == statistics.fmean(samples)
    assert found.stdev == (statistics.stdev(samples) if len(samples) > 1 else 0.0)


@given(st.lists(st.floats(0.5, 100), min_size=2, max_size=30), st.randoms(use_true_random=False))
def test_the_order_of_repeats_does_not_matter(samples, random):
    mixed = random.sample(samples, len(samples))
    first, other = estimate(samples), estimate(mixed)
    assert (first.low, first.median, first.high) == (other.low, other.median, other.high)


def test_spread_is_the_longer_arm():
    found = estimate([90.0, 98.0, 100.0, 101.0, 104.0])
    assert found.spread == pytest.approx(0.10)
    assert estimate([0.0, 0.0, 0.0]).spread == 0
    assert estimate([-1.0, 0.0, 1.0]).spread == math.inf
    assert estimate([7.0]).spread == 0


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), st.floats(0, 1))
def test_quantiles_are_those_of_numpy(samples, share):
    assert quantile(sorted(samples), share) == pytest.approx(float(np.quantile(samples, share)), abs=1e-9)


def wilson(hits: int, n: int, z: float) -> tuple[float, float]:
    """The shares p at which the observed one is exactly z standard errors of p away: found by halving."""

    def root(inside: float, outside: float) -> float:
        for _ in range(200):
            p = (inside + outside) / 2
            if abs(hits / n - p) <= z * math.sqrt(p * (1 - p) / n):
                inside = p
            else:
                outside = p
        return inside

    return root(hits / n, 0.0), root(hits / n, 1.0)


@pytest.mark.parametrize("n", [1, 2, 5, 10, 37, 400])
def test_the_interval_of_a_share_solves_wilsons_equation(n):
    for hits in sorted({0, 1, n // 3, n // 2, n - 1, n}):
        z = statistics.NormalDist().inv_cdf(0.975)
        assert share_interval(hits, n) == pytest.approx(wilson(hits, n, z), abs=1e-6)


def test_the_interval_of_a_share_stays_a_share():
    assert share_interval(0, 0) == (0.0, 1.0)
    low, high = share_interval(5, 5)
    assert high == 1.0 and 0.5 < low < 0.6
    low, high = share_interval(0, 5)
    assert low == 0.0 and 0.4 < high < 0.5
