"""Honest repeats: every figure at least five times, in rounds, and on until its median is known well enough.

A round takes each unfinished figure once, so that a drift of the machine reaches all of them alike. The stopping rule
looks at the interval it is judged by, which makes that interval a little too narrow (optional stopping): simulated
with repeats that scatter by 1 to 50 %, a nominal 95 % covers the true median in 90 to 95 % of all runs. Where repeats
scatter by more than 10 %, the few runs that come out steady are lucky ones: by 15 %, one in eight does, and a quarter
of those miss it (tests/bench/test_rounds.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from efficli.ops.statistics import estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How often to repeat: `least` times, then until the interval is `within` a share of the median, `most` times.

    `patience` is how many seconds the repeats beyond `least` may take together.
    """

    least: int = 5
    most: int = 30
    within: float = 0.05
    patience: float = 20.0

    def wants_more(self, values: Sequence[Sequence[float]], spent: float) -> bool:
        """Whether another repeat is due: `values` is (repeats, quantities), all of which have to become steady.

        `spent` is how long the repeats beyond `least` have taken, in seconds.
        """
        n = len(values)
        if n < self.least:
            return True
        if n >= self.most or spent >= self.patience:
            return False
        return any(estimate(samples).spread > self.within for samples in zip(*values, strict=True))


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement: `once` makes it and returns the quantities by which its steadiness is judged."""

    once: Callable[[], Sequence[float]]
    values: list[Sequence[float]] = field(default_factory=list)
    """What `once` returned, each time."""


def run_rounds(tasks: Sequence[Task], effort: Effort, after: Callable[[], None] | None = None) -> None:
    """Repeat all tasks in rounds until each is steady or has had its share; `after` is called after each repeat.

    What was measured before an exception stays in `values`.
    """
    beyond = 0.0
    while due := [task for task in tasks if effort.wants_more(task.values, beyond)]:
        began = time.monotonic()
        for task in due:
            task.values.append(task.once())
            if after:
                after()
        if len(due[0].values) > effort.least:
            beyond += time.monotonic() - began
