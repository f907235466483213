"""How lines about several artifacts become a table that fits a terminal of 80 columns.

Artifacts are rows, because their names are long. Where several of them meet several tests, a line names the test and
the artifacts follow it, so that what is to be compared stands below each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from efficli.bench.figures import ArtifactResult, BenchResult, SpeedTest
from efficli.bench.wording import cut_names, short_names

Table = tuple[str, Sequence[str], list[list[str]]]
"""Title, headings, rows."""

NAME_WIDTH = 22
"""Characters of an artifact's name in a table, so that the widest tables fit."""


class Entry(NamedTuple):
    """One line before it is laid out: of which group (a test, a way to start), of which artifact."""

    group: str
    name: str
    cells: list[str]


def lay_out(title: str, columns: Sequence[str], entries: Sequence[Entry]) -> Table:
    """Lines of groups and artifacts; what all lines share goes into the title."""
    groups = list(dict.fromkeys(entry.group for entry in entries))
    names = {entry.name for entry in entries}
    heading = ["", *columns]
    if len(groups) == 1:
        return f"{title}, {groups[0]}", heading, [[entry.name, *entry.cells] for entry in entries]
    if len(names) == 1:
        return f"{title}: {entries[0].name}", heading, [[entry.group, *entry.cells] for entry in entries]
    rows = []
    for group in groups:
        rows.append([group, *[""] * len(columns)])
        rows += [[f"  {entry.name}", *entry.cells] for entry in entries if entry.group == group]
    return title, heading, rows


def absent(result: BenchResult, artifact: ArtifactResult, *, writes: bool = False) -> str:
    """Why there is no figure where others have one; `writes`: of something that only a model that writes can do."""
    if artifact.failure:
        return "failed"
    if writes and artifact.model and not artifact.model.generates:
        return "writes no text"
    return "not reached" if result.interrupted else "not measured"


def rows_of(result: BenchResult) -> Iterator[tuple[ArtifactResult, str]]:
    """Every artifact and its name in a table; `footnotes` has the names that were cut."""
    names = cut_names([name for _, name in named(result)], NAME_WIDTH)
    return ((artifact, names[name]) for artifact, name in named(result))


def named(result: BenchResult) -> Iterator[tuple[ArtifactResult, str]]:
    """Every artifact and its short name."""
    names = short_names([artifact.path for artifact in result.artifacts])
    return ((artifact, names[artifact.path]) for artifact in result.artifacts)


def tests_of(result: BenchResult, *, prompt: bool) -> list[SpeedTest]:
    """Every prefill, or every decode, that was planned or measured, in that order."""
    planned = [test for artifact in result.artifacts for test in artifact.planned]
    measured = [one.test for artifact in result.artifacts for one in artifact.tests]
    return [test for test in dict.fromkeys([*planned, *measured]) if bool(test.n_prompt) is prompt]
