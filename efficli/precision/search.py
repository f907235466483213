"""The last word: candidates are measured together, and the best is improved by measured swaps within its bytes.

Losses of single tensors do not quite add up, least of all below 3 bits. So the candidates (allocations of every loss
model that is there, llama.cpp's presets, one type for all) are measured whole on the selection text and the best one is
kept: it is never worse than a preset there. Then, round by round, every tensor is tried one step up and one step down
around the present choice; an allocation of these measured differences within the budget, or else its best pairs of a
step up and a step down, is taken if the divergence falls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficli.artifact.temporary import scratch_directory
from efficli.network.divergence import Divergence
from efficli.ops.allocate import Choice, Item, allocate, harmonize
from efficli.ops.child import run_child
from efficli.precision.measure import Bench, build
from efficli.precision.typed import TypedNetwork
from efficli.progress import Progress

Types = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to search; `nbytes` and `losses` are by tensor and type, for all types that are allowed."""

    candidates: Mapping[str, Types]
    """Name -> types of all tensors, all within the budget."""
    nbytes: Mapping[str, Mapping[str, int]]
    losses: Mapping[str, Mapping[str, float]]
    budget: int
    """Bytes of these tensors together."""
    trials: int
    """Measurements of single steps at most; 0: the candidates alone are measured."""
    groups: Mapping[str, Sequence[str]]
    """Tensors that share a type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What was found, on the selection text."""

    types: Types
    divergence: float
    """Mean KL divergence, nats, of `types`."""
    start: str
    """The candidate that it grew from."""
    measured: Mapping[str, float]
    """Mean KL divergence of each candidate."""
    trials: int
    accepted: int
    positions: int


def search(bench: Bench, task: Task, progress: Progress) -> Found:
    """The best types that were found, in a child process; a function of its arguments, with the same threads."""
    with scratch_directory() as folder:
        argument = bench.to_json(folder) | {
            "task": {name: getattr(task, name) for name in Task.__slots__},
            "out": str(folder / "found.json"),
        }
        run_child("efficli.precision.search:work", argument, what="searching types", progress=progress)
        return Found(**json.loads((folder / "found.json").read_text()))


def work(argument: Mapping[str, Any], progress: Progress) -> None:
    """The child's part of `search`."""
    typed, divergence = build(argument)
    walk = Walk(Task(**argument["task"]), typed, divergence, progress)
    found = walk.run()
    Path(argument["out"]).write_text(json.dumps({name: getattr(found, name) for name in Found.__slots__}))


class Walk:
    """One search."""

    def __init__(self, task: Task, typed: TypedNetwork, divergence: Divergence, progress: Progress) -> None:
        self._task, self._typed, self._divergence, self._progress = task, typed, divergence, progress
        self._units = list(task.groups.values()) + [
            [name] for name in task.nbytes if not any(name in members for members in task.groups.values())
        ]
        self._trials = self._accepted = 0

    def run(self) -> Found:
        """Measure the candidates, then walk from the best."""
        task = self._task
        self._progress.start("candidates", len(task.candidates), "files")
        measured = {}
        for name, types in task.candidates.items():
            measured[name] = self._whole(types)
            self._progress.advance(1)
        self._progress.finish()
        start = min(measured, key=lambda name: (measured[name], name))
        types, value = dict(task.candidates[start]), measured[start]
        if task.trials:
            self._progress.start("swaps", task.trials, "trials")
        while self._trials < task.trials:
            better = self._round(types, value)
            if better is None:
                break
            types, value = better
            self._accepted += 1
        self._progress.finish()
        return Found(
            types=types,
            divergence=value,
            start=start,
            measured=measured,
            trials=self._trials,
            accepted=self._accepted,
            positions=self._divergence.positions,
        )

    def _whole(self, types: Types) -> float:
        self._typed.use_all(types)
        return self._divergence.mean(-1)

    def _round(self, types: Types, value: float) -> tuple[Types, float] | None:
        """Types with a lower divergence that differ from `types` by steps of single tensors, or None."""
        self._typed.use_all(types)
        self._divergence.hold()
        changes = self._changes(types, value)
        together = self._together(types, changes)
        if together is not None:
            found = self._whole(together)
            if found < value:
                return together, found
        for pair in self._pairs(types, changes)[:4]:
            found = self._whole(pair)
            if found < value:
                return pair, found
        return None

    def _changes(self, types: Types, value: float) -> list[tuple[Sequence[str], str, float]]:
        """(tensors, type, measured difference) of every step up and down of every unit, as far as trials allow."""
        found = []
        for members in sorted(self._units, key=lambda some: -self._predicted(some, types)):
            if self._trials >= self._task.trials:
                break
            first = min(self._typed.first_layer(name) for name in members)
            for kind in self._neighbours(members, types[members[0]]):
                if not all(self._typed.reaches(name) for name in members):
                    continue
                for name in members:
                    self._typed.use(name, kind)
                found.append((members, kind, self._divergence.mean(first) - value))
                self._trials += 1
                self._progress.advance(1)
            for name in members:
                self._typed.use(name, types[name])
        return found

    def _predicted(self, members: Sequence[str], types: Types) -> float:
        """What a unit loses now: those that lose most are tried first."""
        return sum(self._task.losses[name][types[name]] for name in members)

    def _neighbours(self, members: Sequence[str], kind: str) -> list[str]:
        """The next cheaper and the next dearer type of those that nothing else beats in bytes and predicted loss."""
        sizes, losses = self._sums(members)
        best: list[str] = []
        for other in sorted(sizes, key=lambda k: (sizes[k], losses[k], k)):
            if other == kind or not best or losses[other] < losses[best[-1]]:
                best.append(other)
        place = best.index(kind)
        return best[max(0, place - 1) : place] + best[place + 1 : place + 2]

    def _sums(self, members: Sequence[str]) -> tuple[dict[str, int], dict[str, float]]:
        kinds = [k for k in self._task.nbytes[members[0]] if all(k in self._task.nbytes[name] for name in members)]
        return (
            {kind: sum(self._task.nbytes[name][kind] for name in members) for kind in kinds},
            {kind: sum(self._task.losses[name][kind] for name in members) for kind in kinds},
        )

    def _together(self, types: Types, changes: Sequence[tuple[Sequence[str], str, float]]) -> Types | None:
        """All steps at once that measured differences speak for, within the budget."""
        lowest = min((difference for _, _, difference in changes), default=0.0)
        items = []
        for members in self._units:
            sizes, _ = self._sums(members)
            own = types[members[0]]
            choices = [Choice(own, sizes[own], max(0.0, -lowest))]
            choices += [
                Choice(kind, sizes[kind], difference - min(0.0, lowest))
                for some, kind, difference in changes
                if some is members
            ]
            items.append(Item(members[0], tuple(choices)))
        picks = allocate(items, self._task.budget).picks
        new = {name: picks[members[0]] for members in self._units for name in members}
        return new if new != types else None

    def _pairs(self, types: Types, changes: Sequence[tuple[Sequence[str], str, float]]) -> list[Types]:
        """A step down that pays for a step up, the most promising first."""
        spent = sum(self._task.nbytes[name][kind] for name, kind in types.items())
        told = []
        for members, kind, difference in changes:
            sizes, _ = self._sums(members)
            told.append((members, kind, difference, sizes[kind] - sizes[types[members[0]]]))
        downs, ups = [t for t in told if t[3] < 0], [t for t in told if t[3] > 0]
        found = []
        for up in ups:
            for down in downs:
                gain = up[2] + down[2]
                if down[0] is not up[0] and gain < 0 and spent + up[3] + down[3] <= self._task.budget:
                    found.append((gain, {**types, **dict.fromkeys(up[0], up[1]), **dict.fromkeys(down[0], down[1])}))
        return [new for _, new in sorted(found, key=lambda pair: pair[0])]


def tied(items: Sequence[Item], groups: Mapping[str, Sequence[str]], budget: int) -> tuple[Types, float, float]:
    """The allocation of items of which groups share a choice: (types, loss, proven relative gap)."""
    together = harmonize(items, groups)
    found = together.expand(allocate(together.items, budget))
    return dict(found.picks), found.loss, found.gap
