"""Scenarios as tables of words: each objective, how long requests took, and how many met it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from efficli.bench.figures import ArtifactResult, BenchResult
from efficli.bench.layout import Entry, Table, absent, lay_out, named, rows_of
from efficli.bench.wording import figure, milliseconds, number, share

if TYPE_CHECKING:
    from efficli.bench.scenario_result import Figure, ScenarioResult, Share

WORDS: dict[Figure, str] = {"ttft_ms": "first token", "tpot_ms": "each token", "total_ms": "answer"}
ALL = "all of them (goodput)"
COLUMNS = ("median, ms", "p95", "in time, %", "n")


def scenario_tables(result: BenchResult) -> Iterator[Table]:
    """One table for each scenario: a line for each objective and artifact, and one for all objectives together."""
    scenarios = {found.name: found for artifact in result.artifacts for found in artifact.scenarios}
    for name, first in scenarios.items():
        entries = []
        for one in _figures(first):
            for artifact, artifact_name in rows_of(result):
                found = _scenario(artifact, name)
                cells = _cells(found, one) if found else [absent(result, artifact, writes=True), "", "", ""]
                entries.append(Entry(_group(first, one), artifact_name, cells))
        yield lay_out(f"Scenario {name} ({first.about})", COLUMNS, entries)


def scenario_notes(result: BenchResult) -> Iterator[str]:
    """What a reader must know about them."""
    found = [scenario for artifact in result.artifacts for scenario in artifact.scenarios]
    if any(scenario.samples for scenario in found):
        yield "in time: share of the requests, with Wilson's 95 % interval; goodput: of those that met all objectives"
    if any("tpot_ms" in scenario.objectives for scenario in found):
        yield "each token (TPOT): mean time of the tokens after the first"
    for artifact, name in named(result):
        for scenario in artifact.scenarios:
            if 0 < len(scenario.samples) < scenario.requests:
                yield f"{name}, {scenario.name}: ended after {len(scenario.samples)} of {scenario.requests} requests"
    yield from dict.fromkeys(f"{scenario.name}: {note}" for scenario in found for note in scenario.notes)


def _figures(scenario: ScenarioResult) -> list[Figure | None]:
    """The headline, the objectives, and None for all of them together."""
    chosen: list[Figure | None] = list(dict.fromkeys([scenario.headline, *scenario.objectives]))
    return [*chosen, None] if len(scenario.objectives) > 1 else chosen


def _group(scenario: ScenarioResult, one: Figure | None) -> str:
    if one is None:
        return ALL
    limit = scenario.objectives.get(one)
    return WORDS[one] if limit is None else f"{WORDS[one]} within {milliseconds(limit)}"


def _cells(found: ScenarioResult, one: Figure | None) -> list[str]:
    n = len(found.samples)
    if not n:
        return ["failed" if found.failure else "not reached", "", "", ""]
    if one is None:
        return ["", "", _share(found.goodput), str(n)]
    series, p95 = found.series(one), found.p95(one)
    return [
        figure(series) if series else "",
        number(p95) if p95 is not None else "",
        _share(found.share(one)) if one in found.objectives else "",
        str(n),
    ]


def _share(met: Share) -> str:
    return share(met.met, met.n, met.low, met.high)


def _scenario(artifact: ArtifactResult, name: str) -> ScenarioResult | None:
    return next((found for found in artifact.scenarios if found.name == name), None)
