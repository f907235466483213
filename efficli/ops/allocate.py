"""One choice for each item so that the costs fit a budget and the losses add up to as little as possible.

The multiple-choice knapsack problem (Sinha & Zoltners 1979; Pisinger, A minimal algorithm for the multiple-choice
knapsack problem, 1995): minimise sum_i loss[i, x_i] subject to sum_i cost[i, x_i] <= budget.  Costs are whole numbers
(bytes, operations), losses are finite and not negative; what they stand for is the caller's.

`ops.knapsack` has the search: convex hulls, the Lagrangian dual, a fill of what is left, then dynamic programming over
the few choices that the dual leaves open.  An allocation carries the proven bound and its distance from it.
The result is deterministic: items are worked on in the order of their names, and of equal choices the first counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from efficli.errors import FitError, UsageError
from efficli.ops.knapsack import Curve, Search


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to treat an item: what it costs and how much is lost by it."""

    name: str
    cost: int
    loss: float


@dataclass(frozen=True, slots=True)
class Item:
    """Something that needs exactly one of its choices."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """A choice for every item, and how good that is."""

    picks: Mapping[str, str]
    """Item name -> choice name, in the order of the items."""
    cost: int
    loss: float
    bound: float
    """Proven, to rounding: no allocation within the budget loses less."""

    @property
    def gap(self) -> float:
        """Relative distance from the proven bound, (loss - bound) / loss; 0 where the loss is 0."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


def smallest_cost(items: Sequence[Item]) -> int:
    """Cost of the cheapest allocation: no budget below it can be met."""
    return sum(min(choice.cost for choice in item.choices) for item in items)


def saturating_cost(items: Sequence[Item]) -> int:
    """Cost at which every item has its least loss: more budget than this buys nothing."""
    return sum(min((choice.loss, choice.cost) for choice in item.choices)[1] for item in items)


def allocate(items: Sequence[Item], budget: int) -> Allocation:
    """The choices of least total loss whose total cost is within the budget.

    No single item of the result can be changed to a choice of lower loss within what is left of the budget. FitError
    if the cheapest allocation is above the budget; ValueError for items that are not ones (no choices, a name twice,
    a loss that is negative, infinite or not a number).
    """
    _check(items)
    least = smallest_cost(items)
    if least > budget:
        raise FitError(f"the smallest possible cost is {least}, above the budget of {budget}")
    curves = [_efficient(item.choices) for item in sorted(items, key=lambda item: item.name)]
    names = sorted(item.name for item in items)
    if saturating_cost(items) <= budget:
        picks, bound = [len(curve) - 1 for curve in curves], math.inf
    else:
        picks, bound = _solve(curves, budget)
    chosen = {name: curve[pick] for name, curve, pick in zip(names, curves, picks, strict=True)}
    loss = math.fsum(choice.loss for choice in chosen.values())
    return Allocation(
        picks={item.name: chosen[item.name].name for item in items},
        cost=sum(choice.cost for choice in chosen.values()),
        loss=loss,
        bound=max(0.0, min(loss, bound)),
    )


@dataclass(frozen=True, slots=True)
class Harmonized:
    """Items of which some stand for a group that shares one choice; see `harmonize`."""

    items: tuple[Item, ...]
    members: Mapping[str, tuple[str, ...]]
    """Every item's name -> the items that it stands for: itself, or its group."""
    order: tuple[str, ...]
    """The items before they were tied."""

    def expand(self, allocation: Allocation) -> Allocation:
        """The allocation with a group's choice given to each of its members; cost, loss and bound stay."""
        given = {name: pick for item, pick in allocation.picks.items() for name in self.members[item]}
        return Allocation(
            picks={name: given[name] for name in self.order},
            cost=allocation.cost,
            loss=allocation.loss,
            bound=allocation.bound,
        )


def harmonize(items: Sequence[Item], groups: Mapping[str, Collection[str]]) -> Harmonized:
    """Tie the items of each group (name -> item names) to one common choice.

    A group becomes one item in the place of its first member, with the choices that all members have, in that member's
    order; costs and losses are added up. UsageError if members have no choice in common or an item is in two groups;
    ValueError for a member that is no item, an empty group, or a group that has the name of an item outside of it.
    """
    known = {item.name: item for item in items}
    group_of: dict[str, str] = {}
    for group, members in groups.items():
        strangers = [name for name in members if name not in known]
        if strangers or not members or (group in known and group not in members):
            raise ValueError(f"group {group!r} of {list(members)}: empty, not of items, or named as another item")
        for name in members:
            if group_of.setdefault(name, group) != group:
                raise UsageError(f"{name} is in two groups, {group_of[name]} and {group}", hint="tie it in one of them")
    tied: list[Item] = []
    standing: dict[str, tuple[str, ...]] = {}
    for item in items:
        group = group_of.get(item.name, item.name)
        if group not in standing:
            together = [other for other in items if other.name in groups[group]] if item.name in group_of else [item]
            standing[group] = tuple(other.name for other in together)
            tied.append(_tie(group, together))
    return Harmonized(tuple(tied), standing, tuple(item.name for item in items))


def _tie(name: str, members: Sequence[Item]) -> Item:
    """One item with the choices that all members have."""
    tables = [{choice.name: choice for choice in member.choices} for member in members]
    shared = [choice.name for choice in members[0].choices if all(choice.name in table for table in tables)]
    if not shared:
        has = "; ".join(f"{member.name}: {', '.join(choice.name for choice in member.choices)}" for member in members)
        raise UsageError(f"the members of group {name} have no choice in common ({has})", hint="leave one of them out")
    return Item(
        name,
        tuple(
            Choice(key, sum(table[key].cost for table in tables), math.fsum(table[key].loss for table in tables))
            for key in shared
        ),
    )


def _check(items: Sequence[Item]) -> None:
    """ValueError for what cannot be allocated."""
    if len({item.name for item in items}) < len(items):
        raise ValueError("an item's name occurs twice")
    for item in items:
        if not item.choices or len({choice.name for choice in item.choices}) < len(item.choices):
            raise ValueError(f"{item.name} has no choices, or two of one name")
        for choice in item.choices:
            if not (math.isfinite(choice.loss) and choice.loss >= 0):
                raise ValueError(f"{item.name}: the loss of {choice.name} is {choice.loss}, not finite and >= 0")
    if sum(max(abs(choice.cost) for choice in item.choices) for item in items) >= 1 << 52:
        raise ValueError("costs add up to more than 2^52, where float64 no longer counts")
    if not math.isfinite(sum(max(choice.loss for choice in item.choices) for item in items)):
        raise ValueError("losses add up to infinity")


def _efficient(choices: Sequence[Choice]) -> list[Choice]:
    """The choices that no other dominates, by rising cost and falling loss; of equal ones the first."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, choice.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _solve(choices: Sequence[Sequence[Choice]], budget: int) -> tuple[list[int], float]:
    """Indices of the chosen efficient choices, and the proven bound; the budget is above the cheapest allocation's."""
    unit = math.gcd(*(choice.cost - curve[0].cost for curve in choices for choice in curve))
    # A power of two changes no digit and keeps quotients of extreme losses within float64's range.
    exponent = math.frexp(max(curve[0].loss for curve in choices))[1]
    curves = [
        Curve(
            np.array([(choice.cost - curve[0].cost) // unit for choice in curve], dtype=np.int64),
            np.ldexp(np.array([choice.loss for choice in curve]), -exponent),
        )
        for curve in choices
    ]
    search = Search(curves, (budget - sum(curve[0].cost for curve in choices)) // unit)
    search.run()
    return search.picks, math.ldexp(search.bound, exponent)
