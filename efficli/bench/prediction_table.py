"""What other devices are predicted to do, beside what this machine did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from efficli.bench.figures import ArtifactResult, BenchResult, SpeedTest
from efficli.bench.layout import Entry, Table, lay_out, named, rows_of
from efficli.bench.wording import figure, main_test, result_of
from efficli.ops.byte_size import binary_bytes

if TYPE_CHECKING:
    from efficli.target import Prediction, Range

BESIDE, LETTERS = 2, 16
"""Targets in one table about one artifact, if their names have no more letters; about several artifacts it is one.
More do not fit 80 columns."""

MILLI = 1000
UNKNOWN = "not known"
VERDICTS = {"fits": "fits", "tight": "tight", "no": "too large"}


def prediction_tables(result: BenchResult) -> Iterator[Table]:
    """Measured here, and predicted for each target."""
    targets = list(dict.fromkeys(found.target for artifact in result.artifacts for found in artifact.predictions))
    beside = BESIDE if sum(bool(artifact.predictions) for artifact in result.artifacts) == 1 else 1
    while targets:
        chosen = targets[:beside]
        if sum(map(len, chosen)) > LETTERS:
            chosen = targets[:1]
        targets = targets[len(chosen) :]
        columns = ["measured here", *(f"{target} (predicted)" for target in chosen)]
        entries = []
        for group, measured, predicted in _lines(result):
            for artifact, name in rows_of(result):
                by_target = {found.target: found for found in artifact.predictions}
                cells = [predicted(by_target[target]) if target in by_target else "" for target in chosen]
                if any(cells):
                    entries.append(Entry(group, name, [measured(artifact), *cells]))
        yield lay_out("Predictions, not measurements", columns, entries)


def prediction_notes(result: BenchResult) -> Iterator[str]:
    """The formula, and for each target what it was reckoned from, with the sources."""
    found = [(one, name) for artifact, name in named(result) for one in artifact.predictions]
    for formula in dict.fromkeys(one.formula for one, _ in found):
        yield f"predicted by {formula}; in brackets the range that it may lie in"
    for target in dict.fromkeys(one.target for one, _ in found):
        own = {name: _reasons(one) for one, name in found if one.target == target}
        shared = [reason for reason in next(iter(own.values())) if all(reason in reasons for reasons in own.values())]
        yield f"{target}: {'; '.join(shared)}"
        for name, reasons in own.items():
            if len(reasons) > len(shared):
                yield f"{target} with {name}: {'; '.join(reason for reason in reasons if reason not in shared)}"


def _reasons(one: Prediction) -> list[str]:
    storage = next(iter(one.load_s), None)
    return [
        *([f"decode waits for {one.limited_by}"] if one.limited_by else []),
        *([f"its least certain figure: {one.confidence}"] if one.confidence else []),
        *one.sentences,
        *([f"load is the time to read the file from {storage}"] if storage else []),
    ]


class _Line(NamedTuple):
    """One figure: what it is called, what was measured here, and what is predicted."""

    group: str
    measured: Callable[[ArtifactResult], str]
    predicted: Callable[[Prediction], str]


def _lines(result: BenchResult) -> list[_Line]:
    decode, prefill = main_test(result.artifacts, prompt=False), main_test(result.artifacts, prompt=True)
    after = f" after {decode.n_depth}" if decode and decode.n_depth else ""
    return [
        _Line(f"decode{after}, tokens/s", lambda artifact: _rate(artifact, decode), lambda one: _range(one.decode)),
        _Line("prefill, tokens/s", lambda artifact: _rate(artifact, prefill), lambda one: _range(one.prefill)),
        _Line("load cold, ms", _load, lambda one: _range(next(iter(one.load_s.values()), None), MILLI)),
        _Line("energy, mJ/token", lambda artifact: _energy(artifact, decode), lambda one: _range(one.energy_j, MILLI)),
        _Line("memory", _peak, lambda one: f"{binary_bytes(one.memory.need_bytes)}: {VERDICTS[one.memory.verdict]}"),
    ]


def _range(found: Range | None, scale: float = 1.0) -> str:
    """Two significant digits: more would pretend."""
    if found is None:
        return UNKNOWN
    value, low, high = (_two_digits(end * scale) for end in (found.value, found.low, found.high))
    return value if low == high else f"{value} ({low} - {high})"


def _two_digits(value: float) -> str:
    places = 1 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{round(value, places):.{max(0, places)}f}"


def _rate(artifact: ArtifactResult, test: SpeedTest | None) -> str:
    found = result_of(artifact, test) if test else None
    return figure(found.rate, interval=False) if found else ""


def _energy(artifact: ArtifactResult, test: SpeedTest | None) -> str:
    found = result_of(artifact, test) if test else None
    return figure(found.energy, interval=False, scale=MILLI) if found and found.energy else ""


def _load(artifact: ArtifactResult) -> str:
    cold = next((start for start in artifact.starts if start.cold), None)
    return figure(cold.load, interval=False) if cold else ""


def _peak(artifact: ArtifactResult) -> str:
    return binary_bytes(artifact.memory.peak_rss) if artifact.memory else ""
