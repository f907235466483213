"""Repeats: how many, of what, when they end, and how often the interval that ended them is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest

from efficli.bench import rounds
from efficli.bench.rounds import Effort, Task, run_rounds
from efficli.ops.statistics import estimate

PATIENT = Effort(patience=1e9)


def endless(values: Iterable[float]) -> Callable[[], tuple[float]]:
    """A measurement that takes these values in turn, for ever."""
    following = itertools.cycle(values)
    return lambda: (next(following),)


def repeats(values: Iterable[float], effort: Effort = PATIENT) -> int:
    task = Task(endless(values))
    run_rounds([task], effort)
    return len(task.values)


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(rounds, "time", found)
    return found


def test_what_is_steady_is_repeated_as_often_as_it_must():
    assert repeats([100.0]) == 5
    assert repeats([100, 101, 99, 100, 100]) == 5
    assert repeats([100.0], Effort(least=7)) == 7


def test_what_is_not_steady_is_repeated_as_often_as_it_may():
    assert repeats([50, 100, 200]) == 30
    assert repeats([50, 100, 200], Effort(most=12, patience=1e9)) == 12
    assert repeats([50, 100, 200], Effort(least=9, most=9)) == 9


def test_it_ends_when_the_interval_is_narrow_enough_and_not_before():
    """One bad repeat among the first: with five the interval is their range, later it leaves the worst out."""
    values = [80.0, *[100.0] * 29]
    task = Task(endless(values))
    run_rounds([task], PATIENT)
    n = len(task.values)
    assert 5 < n < 30
    assert estimate(values[:n]).spread <= 0.05
    assert all(estimate(values[:k]).spread > 0.05 for k in range(5, n))


def test_a_wider_wish_ends_sooner():
    values = np.random.default_rng(0).normal(100, 8, 40).tolist()
    taken = [repeats(values, Effort(within=within, patience=1e9)) for within in (0.2, 0.1, 0.05, 0.01)]
    assert taken == sorted(taken)
    assert taken[0] == 5
    assert taken[-1] == 30


def test_all_quantities_of_a_measurement_must_become_steady():
    def both(noisy: Iterable[float]) -> int:
        other = itertools.cycle(noisy)
        task = Task(lambda: (100.0, next(other), 5.0))
        run_rounds([task], PATIENT)
        return len(task.values)

    assert both([1.0]) == 5
    assert both([1.0, 2.0, 3.0]) == 30
    assert both([0.0]) == 5
    assert both([0.0, 1.0]) == 30


def test_rounds_take_each_unfinished_task_once():
    """Those that are steady drop out, the others go on, and none is favoured."""
    order, calls = list[str](), list[int]()

    def measurement(name: str, values: Sequence[float]) -> Task:
        following = itertools.cycle(values)

        def once() -> tuple[float]:
            order.append(name)
            return (next(following),)

        return Task(once)

    tasks = [measurement("a", [1.0]), measurement("b", [1.0, 2.0]), measurement("c", [1.0])]
    run_rounds(tasks, Effort(most=8, patience=1e9), after=lambda: calls.append(len(order)))
    assert "".join(order) == "abc" * 5 + "b" * 3
    assert calls == list(range(1, 19))
    assert [len(task.values) for task in tasks] == [5, 8, 5]


def test_no_tasks_are_no_work():
    calls: list[int] = []
    run_rounds([], PATIENT, after=lambda: calls.append(1))
    assert calls == []


def test_patience_is_for_the_repeats_beyond_those_that_must_be(clock):
    def slow() -> tuple[float]:
        clock.now += 3.0
        return (clock.now % 7 + 1,)

    def count(patience: float, tasks: int = 1) -> list[int]:
        made = [Task(slow) for _ in range(tasks)]
        run_rounds(made, Effort(patience=patience))
        return [len(task.values) for task in made]

    assert count(0.0) == [5]  # 15 seconds, none of them beyond
    assert count(0.5) == [6]
    assert count(6.0) == [7]
    assert count(6.1) == [8]
    assert count(6.1, tasks=3) == [6, 6, 6]  # they share it
    assert count(1e9) == [30]


def test_what_was_measured_survives_what_ends_it():
    values = iter([1.0, 2.0, 3.0])
    first, second = Task(lambda: (1.0,)), Task(lambda: (next(values),))
    with pytest.raises(StopIteration):
        run_rounds([first, second], PATIENT)
    assert [row[0] for row in second.values] == [1.0, 2.0, 3.0]
    assert len(first.values) == 4

    def interrupted() -> tuple[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_rounds([Task(interrupted)], PATIENT)


# the interval that the rule leaves


def runs(draw: Callable[[], float], truth: float, number: int) -> tuple[float, float, float]:
    """Of so many runs: the share whose interval covers the truth, of those that end steady, and the share of these."""
    covered, steady = [], []
    for _ in range(number):
        task = Task(lambda: (draw(),))
        run_rounds([task], PATIENT)
        found = estimate([row[0] for row in task.values])
        covered.append(found.low <= truth <= found.high)
        steady.append(found.spread <= 0.05)
    lucky = [hit for hit, ended in zip(covered, steady, strict=True) if ended]
    return float(np.mean(covered)), float(np.mean(lucky or [1.0])), float(np.mean(steady))


@pytest.mark.parametrize(("noise", "scatter"), [("both sides", 0.02), ("both sides", 0.07), ("slower", 0.15)])
def test_the_interval_covers_the_truth_in_nine_of_ten_runs(noise, scatter):
    """Simulated with a known median; 0.15 of one-sided noise is the worst that a search found (90.4 %)."""
    random = np.random.default_rng(5)
    if noise == "slower":
        covered, _, _ = runs(lambda: 1 + scatter * random.exponential(), 1 + scatter * float(np.log(2)), 500)
    else:
        covered, _, _ = runs(lambda: float(np.exp(scatter * random.standard_normal())), 1.0, 500)
    assert 0.88 < covered < 0.97  # 0.90 to 0.95, and two standard deviations of 500 runs


@pytest.mark.slow
@pytest.mark.parametrize("scatter", [0.01, 0.05, 0.1, 0.15, 0.5])
def test_what_the_module_says_of_its_intervals(scatter):
    random = np.random.default_rng(0)
    covered, lucky, steady = runs(lambda: float(np.exp(scatter * random.standard_normal())), 1.0, 2000)
    assert 0.89 < covered < 0.965
    if scatter == 0.15:
        assert steady == pytest.approx(1 / 8, abs=0.02)
        assert lucky == pytest.approx(3 / 4, abs=0.08)
