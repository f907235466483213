"""Device profiles as a person reads them: all at a glance, or every figure of one with where it is from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from efficli.target.profile import GROUPS, Decode, Figure, Target

Table = tuple[str, Sequence[str], list[list[str]]]
"""Title, headings, rows."""

USUAL = "llama.cpp"
"""The runtime that is not mentioned in the list."""
_COLUMNS = ("", "also", "RAM GiB", "GB/s", "ISA", "runs", "known by")
_TELLING = ("sme2", "sme", "i8mm", "dotprod", "sve", "rvv", "avx512", "avx2", "avx", "neon")
"""Extensions that decide how fast a type is, the most telling first: one of them is enough to tell devices apart."""
_GIB = 1024


class Row(NamedTuple):
    """A figure of a profile with its name and unit."""

    label: str
    figure: Figure
    unit: str


def overview(targets: Sequence[Target]) -> Iterator[Table]:
    """A table for each group, at most 80 columns wide."""
    for group in (*GROUPS, None):
        rows = [_summary(target) for target in sorted(targets, key=_in_order) if target.group == group]
        if rows:
            yield (group or "others"), _COLUMNS, rows


def overview_notes(targets: Sequence[Target]) -> Iterator[str]:
    """What the columns mean."""
    yield (
        "RAM: what a model can have. GB/s: how fast llama.cpp reads a model for each token, * another runtime first. "
        "Ranges and sources: efficli targets NAME"
    )
    for why in dict.fromkeys(target.why_not for target in targets if target.why_not):
        yield f"{', '.join(target.name for target in targets if target.why_not == why)}: {why}"


def _in_order(target: Target) -> list[tuple[int, str]]:
    """pi5-8gb before pi5-16gb."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", target.name)]


def _summary(target: Target) -> list[str]:
    speed = target.decode[0] if target.decode else None
    isa = next((name for name in _TELLING if name in target.isa), "")
    return [
        target.name,
        target.aliases[0] if target.aliases else "",
        f"{target.ram.usable_mib.value / _GIB:.2g}",
        f"{speed.gb_per_s.value:.3g}{'' if speed.runtime == USUAL else '*'}" if speed else "-",
        isa or "-",
        "both" if len(target.runs) > 1 else "".join(target.runs) or "none",
        speed.gb_per_s.confidence if speed else "-",
    ]


def facts(target: Target) -> Iterator[str]:
    """What is not a figure."""
    if target.aliases:
        yield f"also called {', '.join(target.aliases)}"
    cores = (f"{kind.count} x {kind.name}{f' at {kind.ghz:g} GHz' if kind.ghz else ''}" for kind in target.cores)
    yield f"{target.arch}: {', '.join(cores)}"
    if target.isa:
        yield f"extensions: {', '.join(target.isa)}"
    if target.accelerator:
        yield f"beside them: {target.accelerator}"
    why = f"; {target.why_not}" if target.why_not else ""
    yield f"runs {' and '.join(target.runs) or 'neither gguf nor onnx'}{why}"
    if target.lacks:
        yield f"lacks {', '.join(target.lacks)}: {target.lacks_source}"
    if target.ram.ecc is not None:
        yield "memory with error correction" if target.ram.ecc else "memory without error correction"
    if target.link:
        yield f"link: {target.link.about}"


def figures(target: Target) -> Iterator[Row]:
    """Every figure, in the order of the profile."""
    band, ram = target.bandwidth, target.ram
    yield Row("memory", ram.total_mib, "MiB")
    yield Row("memory, usable", ram.usable_mib, "MiB")
    yield from _there([("memory bus", band.theoretical), ("copy, 1 thread", band.memcpy), ("read", band.read)], "GB/s")
    for speed in target.decode:
        yield from _decode(speed)
    for fill in target.prefill:
        by = "" if target.decode and fill.runtime == target.decode[0].runtime else f", {fill.runtime}"
        yield Row(f"prefill {' '.join(fill.types)}{by}", fill.gops, "Gops/s")
    for store in target.storage:
        yield Row(f"read from {store.kind}", store.mb_per_s, "MB/s")
    yield from _there([("power, idle", target.power.idle_w), ("power, loaded", target.power.load_w)], "W")
    if target.link:
        yield Row("uplink", target.link.uplink_kbit_s, "kbit/s")
        yield Row("pass", target.link.pass_min, "minutes")
        yield Row("passes", target.link.passes_per_day, "a day")
        yield Row("part of the uplink that is payload", target.link.efficiency, "")


def _there(named: Iterable[tuple[str, Figure | None]], unit: str) -> Iterator[Row]:
    yield from (Row(label, figure, unit) for label, figure in named if figure is not None)


def _decode(speed: Decode) -> Iterator[Row]:
    threads = "" if speed.threads is None else f", {speed.threads} thread{'s' if speed.threads > 1 else ''}"
    yield Row(f"decode, {speed.runtime}{threads}", speed.gb_per_s, "GB/s")
    yield Row(f"overhead, {speed.runtime}", speed.overhead_ms, "ms")
    for floor in speed.floors:
        yield Row(f"{' '.join(floor.types)}, {speed.runtime}", floor.gops_per_thread, "Gops/s a thread")


def detail(target: Target) -> Table:
    """Every figure with its unit, the range that predictions take, and the number of its source in `sources`."""
    numbers = {source: str(number) for number, source in enumerate(_sources(target), 1)}
    rows = []
    for label, figure, unit in figures(target):
        known = figure.confidence if figure.n is None else f"{figure.confidence} ({figure.n})"
        name = f"{label}, {unit}" if unit else label
        rows.append([name, _number(figure.value), _range(figure), known, numbers[figure.source]])
    return f"{target.name}: {target.about}", ("", "value", "range", "known by (n)", "from"), rows


def sources(target: Target) -> Iterator[str]:
    """The sources by their numbers, then the profile's notes."""
    yield from (f"{number}  {source}" for number, source in enumerate(_sources(target), 1))
    yield from (f"note: {note}" for note in target.notes)


def _sources(target: Target) -> list[str]:
    return list(dict.fromkeys(row.figure.source for row in figures(target)))


def _range(figure: Figure) -> str:
    found = figure.range
    return "" if found.low == found.high else f"{_number(found.low)}-{_number(found.high)}"


def _number(value: float) -> str:
    """Three digits, and whole numbers whole."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def to_json(target: Target) -> dict[str, Any]:
    """The profile, and its figures once more as a list with label, unit, and the range that predictions take."""
    rows = [
        {
            "figure": label,
            "unit": unit,
            **figure.range.to_json(),
            "n": figure.n,
            "source": figure.source,
            "confidence": figure.confidence,
        }
        for label, figure, unit in figures(target)
    ]
    return target.to_json() | {"figures": rows}
