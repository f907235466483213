"""A plan as a picture: what a file weighs, how fast a device should write with it, and how much it can hold."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from efficli.errors import MissingExtra, OutputError, UsageError
from efficli.ops.storage import replace_file
from efficli.planning.fit import Fit
from efficli.planning.plan import PlanResult
from efficli.target.predict import MARGIN

_MIB = 1 << 20
WIDE = 4
"""Sizes or rates that differ more than so many times are drawn on a logarithmic axis."""
BEYOND = 3
"""A limit that is more than so many times the largest file is named, and not drawn: the files would be one spot."""
_FILL = {"FIT": "full", "TIGHT": "left", "NO": "none"}
_MARKS = "osD^v<>p"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One device of the picture."""

    target: str
    fits: tuple[Fit, ...]
    room: float
    """MiB that a file may have which is not repacked, so that it FITs with its cache and scratch."""


def check(path: Path, force: bool, *, targets: bool) -> None:
    """Before anything is planned: a name, a place, and something to draw. UsageError, OutputError, MissingExtra."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--chart {path}, expected a name that ends in .png")
    if not targets:
        raise UsageError("--chart draws what devices do, expected --target", hint="--target pi5-8gb")
    if not path.parent.is_dir():
        raise OutputError("no such directory", where=str(path.parent))
    if path.is_dir() or (os.path.lexists(path) and not force):
        hint = None if path.is_dir() else "--force replaces it"
        raise OutputError("is a directory" if path.is_dir() else "exists", where=str(path), hint=hint)
    if find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "plot")


def draw(result: PlanResult, path: Path) -> None:
    """Draw a PNG for the shortest context; the file appears whole.

    UsageError where no device has a known speed; MissingExtra without matplotlib; OutputError.
    """
    lines = chart_lines(result)
    if not lines:
        raise UsageError("no device has a speed that is known", where=str(path), hint="efficli targets lists speeds")
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise MissingExtra("matplotlib", "plot") from error
    replace_file(path, _picture(result, lines))


def chart_lines(result: PlanResult) -> list[Line]:
    """The devices whose speed is known, with their files."""
    lines = []
    for target in result.targets:
        fits = tuple(one for one in result.of(target, result.contexts[0]) if one.decode)
        if fits:
            beside = max(one.kv_bytes + one.scratch_bytes.value for one in fits)
            room = (fits[0].usable_bytes.low * (1 - MARGIN) - beside) / _MIB
            lines.append(Line(target=target.name, fits=fits, room=max(room, 0.0)))
    return lines


def _picture(result: PlanResult, lines: Sequence[Line]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes = {one.type: one.file_bytes / _MIB for line in lines for one in line.fits}
    drawn = [line for line in lines if 0 < line.room <= BEYOND * max(sizes.values())]
    _axes(axes, lines, [*sizes.values(), *(line.room for line in drawn)])
    colours = {line.target: f"C{number % 10}" for number, line in enumerate(lines)}
    for number, line in enumerate(lines):
        shift = 0.008 * (number - (len(lines) - 1) / 2)
        _draw(axes, line, colours[line.target], _MARKS[number % len(_MARKS)], shift)
    _draw_limits(axes, drawn, colours)
    axes.legend(loc="best", fontsize=7.5, framealpha=0.9)
    title = f"Size and predicted speed: {result.model.name}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, parse_math=False)
    small = "\n".join(_small_print(result, lines))
    figure.supxlabel(small, x=0.01, ha="left", fontsize=6.5, color="0.35", parse_math=False)
    figure.canvas.draw()  # places are known only after a first drawing
    _name_types(figure, axes, sizes)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _axes(axes: Any, lines: Sequence[Line], sizes: Sequence[float]) -> None:
    axes.set_xlabel("size of the file, MiB")
    axes.set_ylabel("decode, tokens/s (predicted)")
    axes.grid(alpha=0.25)
    _scale(axes.xaxis, axes.set_xscale, axes.set_xlim, sizes)
    speeds = [end for line in lines for one in line.fits if one.decode for end in (one.decode.low, one.decode.high)]
    _scale(axes.yaxis, axes.set_yscale, axes.set_ylim, speeds)


def _scale(
    axis: Any, scale: Callable[[str], Any], limits: Callable[[float, float], Any], values: Sequence[float]
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    if high > WIDE * low > 0:
        scale("log")
        limits(low / 1.25, high * 1.25)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    else:
        margin = 0.08 * (high - low) or 0.1 * high
        limits(max(0, low - margin), high + margin)


def _draw(axes: Any, line: Line, colour: str, mark: str, shift: float) -> None:
    """Marks with their ranges, `shift` of the axis beside their place: devices of the same speed stay apart."""
    low, high = axes.get_xlim()
    style = {"marker": mark, "markersize": 7, "linestyle": "none", "color": colour}
    for one in line.fits:
        assert one.decode is not None
        x, y = one.file_bytes / _MIB, one.decode
        x = x * (high / low) ** shift if axes.get_xscale() == "log" else x + (high - low) * shift
        bars = [[y.value - y.low], [y.high - y.value]]
        axes.errorbar([x], [y.value], yerr=bars, fmt="none", ecolor=colour, alpha=0.45, elinewidth=1, capsize=3)
        axes.plot([x], [y.value], fillstyle=_FILL[one.verdict], markerfacecoloralt="white", **style)
    axes.plot([], [], label=f"{line.target}: room for {_size(line.room)}", **style)


def _draw_limits(axes: Any, lines: Sequence[Line], colours: Mapping[str, str]) -> None:
    """A dashed line where a device's room ends, its name beside it: to the left, unless another line is there."""
    low, high = axes.get_xlim()
    before = -math.inf
    for line in sorted(lines, key=lambda line: line.room):
        is_log = axes.get_xscale() == "log"
        at = math.log(line.room / low) / math.log(high / low) if is_log else (line.room - low) / (high - low)
        side = -1 if at - before > 0.04 else 1
        before, colour = at, colours[line.target]
        axes.axvline(line.room, color=colour, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"{line.target}: {_size(line.room)}", (line.room, 0.02), (3 * side, 0), textcoords="offset points",
            xycoords=("data", "axes fraction"), rotation=90, ha="right" if side < 0 else "left", va="bottom",
            fontsize=7.5, color=colour, parse_math=False,
        )  # fmt: skip


def _name_types(figure: Any, axes: Any, sizes: dict[str, float]) -> None:
    """The types along the upper edge, moved apart where they would cover each other, each with a line to its size."""
    frame = axes.get_window_extent()
    apart = 11 * figure.dpi / 72
    order = sorted(sizes, key=sizes.__getitem__)
    wanted = [axes.transData.transform((sizes[name], 1))[0] for name in order]
    places = spread(wanted, apart, frame.x0, frame.x1)
    for name, x, place in zip(order, wanted, places, strict=True):
        low, high = ((one - frame.x0) / frame.width for one in (x, place))
        axes.plot(
            [low, high], [1.0, 1.035], transform=axes.transAxes, color="0.6", linewidth=0.6, clip_on=False, zorder=1
        )
        axes.text(
            high, 1.045, name, transform=axes.transAxes, rotation=90, ha="center", va="bottom", fontsize=7,
            parse_math=False,
        )  # fmt: skip


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, in their order, at least `apart` from each other, within low .. high."""
    groups: list[tuple[list[float], float]] = []
    for one in wanted:
        members, middle = [one], one
        while groups and groups[-1][1] + (len(groups[-1][0]) + len(members)) / 2 * apart > middle:
            members = groups.pop()[0] + members
            middle = sum(members) / len(members)
        half = (len(members) - 1) / 2 * apart
        groups.append((members, min(max(middle, low + half), max(high - half, low + half))))
    return [
        middle + (index - (len(members) - 1) / 2) * apart for members, middle in groups for index in range(len(members))
    ]


def _small_print(result: PlanResult, lines: Sequence[Line]) -> Iterable[str]:
    """What the picture holds under, and what is not in it."""
    said = [
        f"Predicted, nothing is measured; bar: range. Context {result.contexts[0]}, half of it filled. Filled mark: "
        "fits; half: tight; hollow: does not fit. Dashed: largest file that fits with cache and scratch, unless its "
        "weights are repacked, which takes them twice.",
    ]
    if len(lines) > 1:
        said.append("Marks of several devices stand beside each other at one size.")
    outside = [line.target for line in lines if line.room > BEYOND * max(one.file_bytes for one in line.fits) / _MIB]
    if outside:
        said.append(f"Far beyond the right edge: the room of {', '.join(outside)}.")
    absent = [target.name for target in result.targets if target.name not in {line.target for line in lines}]
    if absent:
        said.append(f"Not drawn, because no speed is known: {', '.join(absent)}.")
    return [piece for line in said for piece in textwrap.wrap(line, 158)]


def _size(mib: float) -> str:
    return f"{mib / 1024:.3g} GiB" if mib >= 1000 else f"{mib:.3g} MiB"
