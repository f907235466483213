"""What other budgets would lose, as numbers and as a picture: the frontier, with llama.cpp's presets beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efficli.ops.allocate import Choice, Item, allocate, saturating_cost, smallest_cost
from efficli.ops.storage import writing

POINTS = 33
DEEPEST = 1e-2
"""What is drawn of the line: down to this share of the least loss of a file that is marked."""
NEAR, NAMED = 1.03, 2
"""Marks within this factor of a size share a label, which names so many of them."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A file: its size in bytes and what it loses, predicted."""

    name: str
    nbytes: int
    loss: float


def frontier(
    nbytes: Mapping[str, Mapping[str, int]], losses: Mapping[str, Mapping[str, float]], fixed: int
) -> list[Mark]:
    """The least predicted loss at budgets from the smallest file to the largest, evenly spaced in logarithm."""
    items = [
        Item(name, tuple(Choice(kind, size, max(0.0, losses[name][kind])) for kind, size in sizes.items()))
        for name, sizes in nbytes.items()
    ]
    low, high = smallest_cost(items), saturating_cost(items)
    found = []
    for budget in np.unique(np.geomspace(low, max(low + 1, high), POINTS).astype(np.int64)):
        solution = allocate(items, int(max(low, budget)))
        found.append(Mark("", fixed + solution.cost, solution.loss))
    return found


def _together(marks: Sequence[Mark]) -> list[Mark]:
    """One mark for those that lie on each other, with the names of all: labels that can be read."""
    left, found = sorted(marks, key=lambda mark: (mark.nbytes, mark.name)), list[Mark]()
    while left:
        first = left[0]
        near = [
            mark
            for mark in left
            if mark.nbytes <= first.nbytes * NEAR and first.loss / NEAR**6 <= mark.loss <= first.loss * NEAR**6
        ]
        left = [mark for mark in left if mark not in near]
        names = [mark.name for mark in near]
        more = f" +{len(names) - NAMED}" if len(names) > NAMED else ""
        found.append(Mark(", ".join(names[:NAMED]) + more, near[-1].nbytes, first.loss))
    return found


def draw(path: Path, line: Sequence[Mark], presets: Sequence[Mark], chosen: Mark, loss: str) -> None:
    """Write the picture (PNG) of predicted loss over file size. ModuleNotFoundError without matplotlib."""
    import matplotlib.figure

    unit, word = (1 << 30, "GiB") if chosen.nbytes >= 1 << 30 else (1 << 20, "MiB")
    figure = matplotlib.figure.Figure(figsize=(7.2, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    good = [mark for mark in presets if mark.loss > 0 and math.isfinite(mark.loss)]
    least = DEEPEST * min([mark.loss for mark in (*good, chosen) if mark.loss > 0], default=0.0)
    shown = [mark for mark in line if mark.loss > least]
    blue, brown = "#1f5fa8", "#b3531c"
    axes.plot([m.nbytes / unit for m in shown], [m.loss for m in shown], color=blue, label="best within a budget")
    axes.scatter(
        [m.nbytes / unit for m in good], [m.loss for m in good], color=brown, s=18, label="llama.cpp's presets"
    )
    for mark in _together(good):
        axes.annotate(mark.name, (mark.nbytes / unit, mark.loss), xytext=(4, 3), textcoords="offset points", fontsize=7)
    if chosen.loss > 0:
        axes.scatter([chosen.nbytes / unit], [chosen.loss], color=blue, s=60, marker="D", label="this file")
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.set_xlabel(f"file, {word}")
    axes.set_ylabel(f"predicted loss ({loss})")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    with writing(path):
        figure.savefig(path, metadata={"Software": None})
