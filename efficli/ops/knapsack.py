"""The search behind `ops.allocate`: multiple-choice knapsack, one choice of each curve within a capacity.

Sinha & Zoltners 1979; Pisinger, A minimal algorithm for the multiple-choice knapsack problem, 1995.  A curve's choices
are those that none other dominates: cost rises and loss falls.

1. Lagrangian dual, exact: the steps along the curves' lower convex hulls, sorted by loss saved per cost, are taken
   until the next no longer fits.  That step's slope is the multiplier mu; taking it in part gives the dual value.
2. Fill: as long as a single curve has a better choice within what is left, the one that saves most is taken, choices
   off the hull too.
3. Closing the integer gap: a choice whose loss + mu cost is more above its curve's least than the gap is in no better
   solution.  The other choices go through dynamic programming over lists of (cost, loss) states, where a state is
   dropped if another costs no more and loses no more, or if the dual bound of its completions is no better than the
   best known solution.  Lists are cut to the most promising states; the least bound of what was cut off is proven, and
   where nothing was cut off the solution is optimal.  Longer lists are tried until then or until LIMIT states.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

LIMIT = 3_000_000
"""States that a search may look at, over all its passes: a second or two."""
NARROWEST = 64
"""States that a list may have in the first pass; eight times more in each further one."""

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
Numbers = TypeVar("Numbers", Int64, Float64)


@dataclass(frozen=True, slots=True)
class Curve:
    """An item's choices, (choices,) each: cost rises and loss falls strictly; the least cost may be taken as 0."""

    cost: Int64
    loss: Float64


def _hull(cost: Int64, loss: Float64) -> list[int]:
    """Indices of a curve's lower convex hull: the loss saved per cost falls strictly from step to step."""
    hull: list[int] = []
    for i in range(len(cost)):
        # Slopes are compared as they are sorted by later: rounding cannot put a curve's steps out of order.
        while len(hull) > 1 and _slope(cost, loss, hull[-2], hull[-1]) <= _slope(cost, loss, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(cost: Int64, loss: Float64, a: int, b: int) -> float:
    return float((loss[a] - loss[b]) / (cost[b] - cost[a]))


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps along the hulls of several curves, those that save most loss per cost first; (steps,) each."""

    owner: Int64
    """Position of the curve in the list that was given."""
    to: Int64
    """Index of the choice that the step leads to."""
    cost: Int64
    saved: Float64

    @classmethod
    def of(cls, curves: Sequence[Curve]) -> _Steps:
        """The steps of all curves."""
        rows: list[tuple[float, int, int, int, float]] = []
        for k, curve in enumerate(curves):
            hull = _hull(curve.cost, curve.loss)
            for a, b in itertools.pairwise(hull):
                cost, saved = int(curve.cost[b] - curve.cost[a]), float(curve.loss[a] - curve.loss[b])
                rows.append((-saved / cost, k, b, cost, saved))
        rows.sort()
        columns = list(zip(*rows, strict=True)) or [(), (), (), (), ()]
        owner, to, cost_ = (np.array(column, dtype=np.int64) for column in columns[1:4])
        return cls(owner, to, cost_, np.array(columns[4], dtype=np.float64))

    def after(self, k: int) -> _Steps:
        """Only those of the curves behind the k-th."""
        keep = self.owner > k
        return _Steps(self.owner[keep], self.to[keep], self.cost[keep], self.saved[keep])

    def saving(self, budget: Int64) -> Float64:
        """The most that can be saved within each budget if the last step may be taken in part: concave."""
        costs = np.concatenate([[0], np.cumsum(self.cost)])
        saved: Float64 = np.interp(budget, costs, np.concatenate([[0.0], np.cumsum(self.saved)]))
        return saved


class Search:
    """The best known solution of a set of curves and what has been proven about it; `run` improves both.

    The capacity pays for every curve's first choice, and not for every curve's last.
    """

    def __init__(self, curves: Sequence[Curve], capacity: int) -> None:
        self.curves = curves
        self.capacity = capacity
        self.picks = [0] * len(curves)
        """Index of each curve's choice."""
        steps = _Steps.of(curves)
        taken = int(np.searchsorted(np.cumsum(steps.cost), capacity, side="right"))
        self.mu = float(steps.saved[taken] / steps.cost[taken])
        cheapest = math.fsum(curve.loss[0] for curve in curves)
        # What sums of losses, none above this one, may be off by.
        self.rounding = 8 * float(np.finfo(np.float64).eps) * cheapest
        saving = float(steps.saving(np.array([capacity]))[0])
        self.dual = cheapest - saving - self.rounding
        self.bound = self.dual
        """Proven, to rounding: no solution loses less."""
        for owner, to in zip(steps.owner[:taken], steps.to[:taken], strict=True):
            self.picks[owner] = int(to)
        self.picks = self._filled(self.picks)
        self.loss = self._loss(self.picks)

    def _loss(self, picks: Sequence[int]) -> float:
        return math.fsum(curve.loss[pick] for curve, pick in zip(self.curves, picks, strict=True))

    def _filled(self, picks: Sequence[int]) -> list[int]:
        """Better choices of single items for as long as what is left of the budget pays for one."""
        picks = list(picks)
        owner = np.repeat(np.arange(len(self.curves)), [len(curve.cost) for curve in self.curves])
        start = np.searchsorted(owner, np.arange(len(self.curves)))
        cost = np.concatenate([curve.cost for curve in self.curves])
        loss = np.concatenate([curve.loss for curve in self.curves])
        while True:
            now = start + np.array(picks)
            left = self.capacity - int(cost[now].sum())
            saved = loss[now][owner] - loss
            saved[cost - cost[now][owner] > left] = 0
            best = int(saved.argmax())
            if saved[best] <= 0:
                return picks
            picks[owner[best]] = best - int(start[owner[best]])

    def run(self) -> None:
        """Passes with longer and longer lists, until the solution is proven or LIMIT is reached."""
        looked_at, width = 0, NARROWEST
        while self.loss > self.bound:
            core = self._core()
            width = min(width, (LIMIT - looked_at) // sum(len(keep) for keep in core))
            if width < NARROWEST:
                return
            looked_at += self._pass(core, width)
            width *= 8

    def _core(self) -> list[Int64]:
        """Of every item, the choices that a better solution may have: with any other, mu alone proves more loss."""
        core: list[Int64] = []
        for curve in self.curves:
            penalty = curve.loss + self.mu * curve.cost
            core.append(np.flatnonzero(penalty - penalty.min() <= self.loss - self.dual))
        return core

    def _pass(self, core: Sequence[Int64], width: int) -> int:
        """Dynamic programming over the core in lists of at most `width` states; how many states were looked at."""
        reduced = [Curve(curve.cost[keep], curve.loss[keep]) for curve, keep in zip(self.curves, core, strict=True)]
        # The largest first: what the small ones can still mend, the bound knows well.
        order = sorted(range(len(reduced)), key=lambda i: -int(reduced[i].cost[-1] - reduced[i].cost[0]))
        stages = [reduced[i] for i in order if len(core[i]) > 1]
        settled = [curve for curve in reduced if len(curve.cost) == 1]
        spent, lost = sum(int(curve.cost[0]) for curve in settled), math.fsum(curve.loss[0] for curve in settled)
        states = _States(self.capacity - spent, self.loss - lost, stages)
        for k in range(len(stages)):
            states.extend(k, width)
        found = states.best()
        if found is not None:
            picks = [int(keep[0]) for keep in core]
            for i, pick in zip((i for i in order if len(core[i]) > 1), found, strict=True):
                picks[i] = int(core[i][pick])
            picks = self._filled(picks)
            if self._loss(picks) < self.loss:
                self.picks, self.loss = picks, self._loss(picks)
        self.bound = max(self.bound, min(self.loss, lost + states.cut - self.rounding))
        return states.looked_at


class _States:
    """The list of (cost, loss) states after each stage: no state costs and loses as much as another."""

    def __init__(self, capacity: int, known: float, stages: Sequence[Curve]) -> None:
        self.known = known
        self.stages = stages
        self.steps = _Steps.of(stages)
        # Behind each stage: what is left if the rest cost as little as they can, and what they then lose.
        self.room = capacity - _behind(np.array([curve.cost[0] for curve in stages], dtype=np.int64))
        self.rest = _behind(np.array([curve.loss[0] for curve in stages]))
        self.cost: Int64 = np.zeros(1, dtype=np.int64)
        self.loss: Float64 = np.zeros(1)
        self.trail: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
        """Of each stage's states, the one that they came from and the choice that was added."""
        self.cut = math.inf
        """The least bound of a state that was cut off for the list's length."""
        self.looked_at = 0

    def extend(self, k: int, width: int) -> None:
        """Every state with every choice of the k-th stage; then what cannot be better than the known solution goes."""
        before, curve = len(self.cost), self.stages[k]
        cost = (curve.cost[:, None] + self.cost).ravel()
        loss = (curve.loss[:, None] + self.loss).ravel()
        self.looked_at += len(cost)
        self.steps = self.steps.after(k)
        origin = np.flatnonzero(cost <= self.room[k])
        origin = origin[np.argsort(cost[origin], kind="stable")]
        origin = origin[_undominated(cost[origin], loss[origin])]
        bound = loss[origin] + (self.rest[k] - self.steps.saving(self.room[k] - cost[origin]))
        promising = bound < self.known
        origin, bound = origin[promising], bound[promising]
        if len(origin) > width:
            ranked = np.argsort(bound, kind="stable")
            self.cut = min(self.cut, float(bound[ranked[width]]))
            origin = origin[np.sort(ranked[:width])]
        self.cost, self.loss = cost[origin], loss[origin]
        choice, parent = np.divmod(origin, max(1, before))
        self.trail.append((parent.astype(np.int32), choice.astype(np.int16)))

    def best(self) -> list[int] | None:
        """The choice of each stage in the state of least loss; None if no state is left."""
        if not len(self.loss):
            return None
        at, picks = int(self.loss.argmin()), []
        for parent, choice in reversed(self.trail):
            picks.append(int(choice[at]))
            at = int(parent[at])
        return picks[::-1]


def _behind(values: Numbers) -> Numbers:
    """The sum of what comes after each value."""
    return np.cumsum(values[::-1])[::-1] - values


def _undominated(cost: Int64, loss: Float64) -> NDArray[np.bool_]:
    """Which states lose less than all that cost no more; states sorted by cost."""
    if not len(cost):
        return np.zeros(0, dtype=np.bool_)
    least = np.minimum.accumulate(loss)
    keep = np.concatenate([[True], loss[1:] < least[:-1]])
    # Among equal costs the last that was kept loses least.
    kept = np.flatnonzero(keep)
    keep[kept[:-1][cost[kept[:-1]] == cost[kept[1:]]]] = False
    return keep
