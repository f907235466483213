"""The allocator against brute force, a dense table over all costs, and its promises on curves as of quantization."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficli.errors import FitError, UsageError
from efficli.ops import knapsack
from efficli.ops.allocate import (
    Allocation,
    Choice,
    Item,
    allocate,
    harmonize,
    saturating_cost,
    smallest_cost,
)

BITS = (1.5625, 1.75, 2.0625, 2.5625, 2.625, 3.0625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5, 16.0)


def brute(items: Sequence[Item], budget: int) -> float:
    """The least loss of all combinations within the budget."""
    return min(
        math.fsum(choice.loss for choice in picks)
        for picks in itertools.product(*(item.choices for item in items))
        if sum(choice.cost for choice in picks) <= budget
    )


def dense(items: Sequence[Item], budget: int) -> float:
    """The same from a table with the least loss of every total cost from 0 to the budget, item by item."""
    table = np.zeros(budget + 1)
    for item in items:
        after = np.full(budget + 1, np.inf)
        for choice in item.choices:
            shifted = table[: budget + 1 - choice.cost] + choice.loss
            after[choice.cost :] = np.minimum(after[choice.cost :], shifted)
        table = after
    return float(table[-1])


def verify(items: Sequence[Item], budget: int, found: Allocation) -> None:
    """What an allocation says of itself, and that no single item has a better choice within what is left."""
    table = {item.name: {choice.name: choice for choice in item.choices} for item in items}
    assert list(found.picks) == [item.name for item in items]
    chosen = {name: table[name][pick] for name, pick in found.picks.items()}
    assert found.cost == sum(choice.cost for choice in chosen.values()) <= budget
    assert found.loss == math.fsum(choice.loss for choice in chosen.values())
    assert 0 <= found.bound <= found.loss
    for item in items:
        now = chosen[item.name]
        assert not any(c.loss < now.loss and c.cost - now.cost <= budget - found.cost for c in item.choices), item


def noise(items: Sequence[Item]) -> float:
    """What sums of these losses may be off by in float64."""
    return 1e-14 * math.fsum(max(choice.loss for choice in item.choices) for item in items)


def curves(count: int, most: int, seed: int, *, like: bool) -> list[Item]:
    """Items with 3 to `most` choices, loss about a 4^-bits; matrices of six shapes, or each of its own."""
    draw = np.random.default_rng(seed)
    shapes = [(896, 896), (128, 896), (4864, 896), (896, 4864), (1024, 3072), (2048, 1024)]
    items = []
    for i in range(count):
        own = (int(draw.integers(100, 5000)), 256 * int(draw.integers(1, 20)))
        rows, columns = shapes[draw.integers(len(shapes))] if like else own
        scale = rows * columns * 10 ** draw.normal(0, 0.7)
        bits = sorted(draw.choice(BITS, int(draw.integers(3, most + 1)), replace=False))
        losses = [float(scale * 4.0**-b * np.exp(draw.normal(0, 0.15))) for b in bits]
        sizes = [rows * int(columns * b / 8) for b in bits]
        items.append(
            Item(f"layer.{i}", tuple(map(Choice, (str(b) for b in bits), sizes, losses))),
        )
    return items


losses = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.floats(0, 10, allow_subnormal=False),
    st.floats(-9, 4).map(lambda power: 10.0**power),
)
lists = st.integers(0, 3).flatmap(
    lambda kind: st.lists(
        st.lists(st.tuples(st.integers(0, (3, 12, 1000, 10**11)[kind]), losses), min_size=1, max_size=5),
        min_size=1,
        max_size=5,
    )
)


def named(table: Sequence[Sequence[tuple[int, float]]]) -> list[Item]:
    """Items of (cost, loss) pairs."""
    return [
        Item(f"i{k}", tuple(Choice(f"c{j}", cost, loss) for j, (cost, loss) in enumerate(pairs)))
        for k, pairs in enumerate(table)
    ]


@settings(max_examples=300, deadline=None)
@given(lists, st.floats(0, 1.05), st.randoms(use_true_random=False))
def test_equals_brute_force(table: list[list[tuple[int, float]]], share: float, shuffle: random.Random) -> None:
    """Any curves, ties and zeros included, at any budget; and whatever the order of the items."""
    items = named(table)
    least = smallest_cost(items)
    budget = int(least + share * (saturating_cost(items) - least))
    found, best = allocate(items, budget), brute(items, budget)
    verify(items, budget, found)
    assert abs(found.loss - best) <= noise(items)
    assert found.bound <= best + noise(items)
    shuffled = shuffle.sample(items, len(items))
    again = allocate(shuffled, budget)
    assert (again.loss, again.cost, again.bound) == (found.loss, found.cost, found.bound)
    assert dict(again.picks) == dict(found.picks)


@pytest.mark.parametrize("seed", range(6))
def test_equals_a_dense_table(seed: int) -> None:
    """Forty items with costs of a few hundred: too many combinations to try, few enough totals to tabulate."""
    draw = random.Random(seed)
    items = named([[(draw.randint(1, 300), draw.random() ** 3) for _ in range(7)] for _ in range(40)])
    least, most = smallest_cost(items), saturating_cost(items)
    for share in (0.03, 0.4, 0.9):
        budget = int(least + share * (most - least))
        found = allocate(items, budget)
        verify(items, budget, found)
        assert found.loss == pytest.approx(dense(items, budget), rel=1e-12)
        assert found.gap < 1e-12


@pytest.mark.parametrize("limit", [0, 2_000, 40_000])
def test_the_bound_stays_below_the_optimum_when_the_search_is_cut(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs and losses that hardly tell choices apart, and fewer states than a proof needs."""
    monkeypatch.setattr(knapsack, "LIMIT", limit)
    draw = random.Random(limit)
    gaps = []
    for _ in range(12):
        # Loss falls in one late drop: nearly all choices are far above the hull.
        items = named([[(c, 30 - 0.01 * c) for c in draw.sample(range(400), 9)] + [(450, 0.0)] for _ in range(30)])
        budget = draw.randint(smallest_cost(items), saturating_cost(items) - 1)
        found, best = allocate(items, budget), dense(items, budget)
        verify(items, budget, found)
        assert found.bound <= best + noise(items) and best <= found.loss + noise(items)
        gaps.append(found.gap)
    assert max(gaps) > 1e-3, "nothing was cut: the case is too easy"


@pytest.mark.parametrize("like", [True, False])
@pytest.mark.parametrize(("count", "most"), [(20, 3), (20, 13), (60, 13), (200, 13)])
def test_gap_on_curves_as_of_quantization(count: int, most: int, like: bool) -> None:
    """At most 0.1 % from the proven bound, from nearly the smallest to nearly the largest budget."""
    items = curves(count, most, seed=count + most, like=like)
    least, wanted = smallest_cost(items), saturating_cost(items)
    for share in (0.01, 0.1, 0.3, 0.6, 0.97):
        budget = int(least + share * (wanted - least))
        found = allocate(items, budget)
        verify(items, budget, found)
        assert found.gap <= 1e-3


def test_large_and_fast() -> None:
    """1500 items with up to 13 choices in a few seconds of a processor."""
    items = curves(1500, 13, seed=5, like=False)
    budget = (smallest_cost(items) + saturating_cost(items)) // 3
    began = time.process_time()
    found = allocate(items, budget)
    assert time.process_time() - began < 5
    verify(items, budget, found)
    assert found.gap <= 1e-3 and found.cost > 0.9999 * budget


def test_the_ends_of_the_budget() -> None:
    """The smallest budget leaves one allocation; a large one gives all their least loss, at the least cost of that."""
    items = [
        Item("a", (Choice("big", 9, 0.0), Choice("bigger", 12, 0.0), Choice("small", 2, 3.0))),
        Item("b", (Choice("only", 4, 1.5),)),
    ]
    assert (smallest_cost(items), saturating_cost(items)) == (6, 13)
    assert dict(allocate(items, 6).picks) == dict(allocate(items, 12).picks) == {"a": "small", "b": "only"}
    for budget in (13, 14, 10**18):
        found = allocate(items, budget)
        assert dict(found.picks) == {"a": "big", "b": "only"}
        assert (found.cost, found.loss, found.bound, found.gap) == (13, 1.5, 1.5, 0)
    with pytest.raises(FitError, match="smallest possible cost is 6, above the budget of 5") as caught:
        allocate(items, 5)
    assert caught.value.exit_code == 4
    assert allocate([], 0).gap == 0


def test_of_equal_choices_the_first() -> None:
    """Ties are broken by the order that the caller gave, and between items by name."""
    twins = (Choice("x", 5, 1.0), Choice("y", 5, 1.0), Choice("none", 0, 2.0))
    assert dict(allocate([Item("b", twins), Item("a", twins)], 5).picks) == {"b": "none", "a": "x"}
    assert dict(allocate([Item("a", twins[1::-1] + twins[2:]), Item("b", twins)], 5).picks) == {"a": "y", "b": "none"}


def test_losses_of_any_scale() -> None:
    """The optimum does not depend on the unit of losses, as far as float64 goes."""
    table = [[(3, 4.0), (5, 2.5), (9, 0.25)], [(1, 8.0), (6, 1.0)], [(2, 3.0), (4, 2.75), (7, 0.5)]]
    picks = dict(allocate(named(table), 17).picks)
    for scale in (2.0**-1000, 1e-30, 1e30, 1e305):
        found = allocate(named([[(cost, loss * scale) for cost, loss in row] for row in table]), 17)
        assert dict(found.picks) == picks and found.gap < 1e-12


@pytest.mark.parametrize(
    "items",
    [
        [Item("a", ())],
        [Item("a", (Choice("x", 1, 0.0),)), Item("a", (Choice("x", 1, 0.0),))],
        [Item("a", (Choice("x", 1, 0.0), Choice("x", 2, 0.0)))],
        [Item("a", (Choice("x", 1, math.nan),))],
        [Item("a", (Choice("x", 1, math.inf),))],
        [Item("a", (Choice("x", 1, -1.0),))],
        [Item("a", (Choice("x", 1 << 60, 1.0),))],
        [Item("a", (Choice("x", 1, 1e308),)), Item("b", (Choice("x", 1, 1e308),))],
    ],
)
def test_what_cannot_be_allocated(items: list[Item]) -> None:
    """A caller's mistake, told as one."""
    with pytest.raises(ValueError, match=r"twice|choices|loss|cost"):
        allocate(items, 100)


@pytest.mark.parametrize("seed", range(40))
def test_harmonized_equals_brute_force(seed: int) -> None:
    """Groups that share a choice by name: the same as trying all combinations that keep to it."""
    draw = random.Random(seed)
    words = ("p", "q", "r", "s")
    items = []
    for name in "abcdef":
        offered = ["p", *draw.sample(words[1:], draw.randint(1, 3))]
        draw.shuffle(offered)
        items.append(Item(name, tuple(Choice(word, draw.randint(0, 40), draw.random()) for word in offered)))
    groups = {"ace": ("e", "a", "c"), "bf": ("b", "f")}
    tied = harmonize(items, groups)
    assert [item.name for item in tied.items] == ["ace", "bf", "d"]
    assert tied.members == {"ace": ("a", "c", "e"), "bf": ("b", "f"), "d": ("d",)}

    legal = [
        picks
        for picks in itertools.product(*(item.choices for item in items))
        if picks[0].name == picks[2].name == picks[4].name and picks[1].name == picks[5].name
    ]
    totals = sorted(sum(choice.cost for choice in picks) for picks in legal)
    assert totals[0] == smallest_cost(tied.items)
    budget = draw.randint(totals[0], totals[-1])
    best = min(math.fsum(c.loss for c in picks) for picks in legal if sum(c.cost for c in picks) <= budget)
    found = tied.expand(allocate(tied.items, budget))
    assert list(found.picks) == list("abcdef")
    assert found.picks["a"] == found.picks["c"] == found.picks["e"] and found.picks["b"] == found.picks["f"]
    chosen = [next(c for c in item.choices if c.name == found.picks[item.name]) for item in items]
    assert found.cost == sum(choice.cost for choice in chosen) <= budget
    assert found.loss == pytest.approx(math.fsum(choice.loss for choice in chosen), rel=1e-12)
    assert found.loss == pytest.approx(best, rel=1e-12) and found.bound <= best * (1 + 1e-12)


def test_groups_that_cannot_be_tied() -> None:
    """No choice in common or an item in two groups is the user's to change; a stranger is the caller's mistake."""
    a, b = Item("a", (Choice("x", 1, 1.0), Choice("y", 2, 0.5))), Item("b", (Choice("z", 1, 1.0),))
    with pytest.raises(UsageError, match=r"members of group g have no choice in common \(a: x, y; b: z\)"):
        harmonize([a, b], {"g": ["a", "b"]})
    with pytest.raises(UsageError, match="a is in two groups, g and h"):
        harmonize([a, b], {"g": ["a"], "h": ["b", "a"]})
    mistakes: list[dict[str, list[str]]] = [{"g": ["a", "c"]}, {"g": []}, {"b": ["a"]}]
    for groups in mistakes:
        with pytest.raises(ValueError, match="empty, not of items"):
            harmonize([a, b], groups)
    assert harmonize([a, b], {}).items == (a, b)
    assert harmonize([a, b], {"a": ["a"]}).items == (a, b)
