"""Figures of a speed benchmark in words: numbers with their interval, names, and the conditions they hold under."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from efficli.bench.figures import ArtifactResult, BenchResult, Series, SpeedResult, SpeedTest
from efficli.ops.byte_size import binary_bytes

UNSTEADY = "*"
"""Marks a range that stands where a median would mislead; explained below the tables."""


CUT = ".."
"""Stands for the beginning of a name that was too long."""


def number(value: float, like: float | None = None) -> str:
    """Three significant digits or all before the point, never an exponent: 7716, 93.7, 0.0912.

    `like`: the number whose decimal places are taken, so that an interval has those of its median.
    """
    scale = abs(value if like is None else like)
    places = max(0, 2 - math.floor(math.log10(scale))) if 0 < scale < 100 else 0
    return f"{value:.{min(places, 9)}f}"


def figure(series: Series, *, interval: bool = True, scale: float = 1.0) -> str:
    """ "7716 (7707 - 7779)"; "4713 - 6510 *" where the median did not settle; "7716 *" where it was one repeat."""
    found = series.estimate
    middle = found.median * scale
    median, low, high = (number(value * scale, middle) for value in (found.median, found.low, found.high))
    if found.n == 1:
        return f"{median} {UNSTEADY}"
    if not series.steady:
        return f"{low} - {high} {UNSTEADY}"
    return f"{median} ({low} - {high})" if interval else median


def milliseconds(value: float) -> str:
    """ "150 ms", "1.5 s", "10 s"."""
    return f"{value:g} ms" if value < 1000 else f"{value / 1000:g} s"


def share(met: int, n: int, low: float, high: float) -> str:
    """A share and its interval in per cent, without the sign: "90 (60 - 98)"."""
    return f"{100 * met / n:.0f} ({100 * low:.0f} - {100 * high:.0f})"


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """The shortest ends of the paths that tell them apart: file names, with folders only where names are the same.

    What cannot be printed (a line break, a byte that is no UTF-8) is written as Python does: it would break a table.
    """
    unique = list(dict.fromkeys(paths))
    parts = {path: PurePath(path).parts or (path,) for path in unique}
    names = {}
    for path in unique:
        for keep in range(1, len(parts[path]) + 1):
            end = parts[path][-keep:]
            if sum(other[-keep:] == end for other in parts.values()) == 1:
                break
        name = os.path.join(*end)  # noqa: PTH118 (a name to read, not a path to open)
        names[path] = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in name)
    return names


def cut_names(names: Iterable[str], most: int) -> dict[str, str]:
    """Names of at most `most` characters: of longer ones the ends, where types stand.

    All from their last hyphen on ("..Q4_K_M.gguf"), or, where that does not tell them apart, as much as there is room
    for; whole where that does not either.
    """
    whole = list(dict.fromkeys(names))
    for ends in ([name.rpartition("-")[2] for name in whole], [name[len(CUT) - most :] for name in whole]):
        cut = [name if len(name) <= most else CUT + end for name, end in zip(whole, ends, strict=True)]
        if len(set(cut)) == len(cut) and all(len(short) <= most for short in cut):
            return dict(zip(whole, cut, strict=True))
    return {name: name for name in whole}


def test_words(test: SpeedTest, *, kind: bool = True, threads: bool = False) -> str:
    """ "decode 128 tokens after 512"; without `kind` "128 tokens after 512"; with `threads` also ", 2 threads"."""
    words = f"{test.tokens} tokens" + (f" after {test.n_depth}" if test.n_depth else "")
    if kind:
        words = f"{'prefill' if test.n_prompt else 'decode'} {words}"
    return f"{words}, {count(test.threads, 'thread')}" if threads else words


def count(n: int, what: str) -> str:
    """ "1 thread", "2 threads"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def main_test(artifacts: Iterable[ArtifactResult], *, prompt: bool) -> SpeedTest | None:
    """The prefill or decode that stands for all where there is room for one: nothing before it, the longest."""
    tests = [one.test for artifact in artifacts for one in artifact.tests if bool(one.test.n_prompt) is prompt]
    return min(tests, key=lambda test: (test.n_depth, -test.threads, -test.tokens), default=None)


def result_of(artifact: ArtifactResult, test: SpeedTest) -> SpeedResult | None:
    """What the artifact did in that test."""
    return next((one for one in artifact.tests if one.test == test), None)


def conditions(result: BenchResult) -> str:
    """What the figures hold under, in one line: processor, threads, cache, versions, repeats and date."""
    machine = result.machine
    settings = [artifact.settings for artifact in result.artifacts if artifact.settings]
    tests = [found for artifact in result.artifacts for found in artifact.tests]
    threads = {found.test.threads for found in tests} or {one.threads for one in settings}
    parts = [str(machine.get("cpu_info") or "unknown processor")]
    if machine.get("cores"):
        parts.append(count(int(machine["cores"]), "core"))
    if machine.get("memory_bytes"):
        parts.append(f"{binary_bytes(machine['memory_bytes'])} of memory")
    if threads:
        parts.append(_span(threads, "thread"))
    if settings:
        parts.append("context " + _joined(sorted({one.ctx for one in settings})))
        parts.append("K/V cache " + _joined(sorted({f"{one.cache_type_k}/{one.cache_type_v}" for one in settings})))
    parts += sorted({artifact.model.runtime for artifact in result.artifacts if artifact.model})
    if tests:
        parts.append(_span({found.rate.estimate.n for found in tests}, "repeat"))
        parts.append(min(found.began for found in tests)[:10])
    return ", ".join(parts)


def _span(values: set[int], what: str) -> str:
    low, high = min(values), max(values)
    return count(low, what) if low == high else f"{low} to {high} {what}s"


def _joined(values: Iterable[object]) -> str:
    return " and ".join(str(value) for value in values)
