"""Several artifacts as a picture: what a file weighs, how fast it writes, and what it lost."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePath
from typing import Any

from efficli.bench.figures import BenchResult, Series, SpeedTest
from efficli.bench.wording import UNSTEADY, conditions, main_test, result_of, short_names, test_words
from efficli.errors import MissingExtra, UsageError
from efficli.ops.storage import replace_file

MIB = 1 << 20
WIDE = 4
"""Sizes or rates that differ more than so many times are drawn on a logarithmic axis."""

NARROW = 0.2
"""An axis spans at least this share of its largest value, so that noise does not look like a difference."""

UNKNOWN = "0.6"
"""Grey, for an artifact whose divergence is not known."""

Rectangle = tuple[float, float, float, float]
"""Left, bottom, right, top; pixels."""


@dataclass(frozen=True, slots=True)
class Point:
    """One artifact of the picture."""

    name: str
    mib: float
    rate: Series
    kld: float | None


def draw(result: BenchResult, path: Path) -> None:
    """Draw a PNG of bytes, tokens/s with intervals, and mean KL divergence as colour; the file appears whole.

    Decode is drawn, or prefill where no artifact writes. UsageError where there is nothing to draw; MissingExtra
    without matplotlib; OutputError.
    """
    test = main_test(result.artifacts, prompt=False) or main_test(result.artifacts, prompt=True)
    points = _points(result, test) if test else []
    if test is None or not points:
        raise UsageError("no artifact has a speed to draw", where=str(path), hint="a chart needs one test that ended")
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise MissingExtra("matplotlib", "plot") from error
    replace_file(path, _picture(result, test, points))


def _points(result: BenchResult, test: SpeedTest) -> list[Point]:
    names, points = short_names([artifact.path for artifact in result.artifacts]), []
    for artifact in result.artifacts:
        found = result_of(artifact, test)
        if found and artifact.model:
            kld = artifact.quality.kld_mean if artifact.quality else None
            points.append(Point(names[artifact.path], artifact.model.nbytes / MIB, found.rate, kld))
    return points


def _picture(result: BenchResult, test: SpeedTest, points: Sequence[Point]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _axes(axes, points, test)
    _draw_points(figure, axes, points)
    shared, labels = _labels([point.name for point in points])
    # names are no formulas, whatever dollar signs are in them
    axes.set_title(f"Size and speed: {shared}", loc="left", fontsize=12, parse_math=False)
    small = "\n".join(_small_print(result, points))
    figure.supxlabel(small, x=0.01, ha="left", fontsize=6.5, color="0.35", parse_math=False)
    figure.canvas.draw()  # places are known only after a first drawing
    _label(figure, axes, points, labels)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()


def _labels(names: Sequence[str]) -> tuple[str, list[str]]:
    """What the names share, for the title ("SmolLM2-*.gguf"), and what is left to tell them apart ("Q4_K_M")."""
    if len(names) == 1:
        return names[0], [""]
    same = next((i for i, signs in enumerate(zip(*names, strict=False)) if len(set(signs)) > 1), min(map(len, names)))
    begin = names[0][: max(names[0].rfind(sign, 0, same) for sign in "-/") + 1]
    ends = {PurePath(name).suffix for name in names}
    end = ends.pop() if len(ends) == 1 else ""
    if not begin and not end:
        return f"{len(names)} artifacts", list(names)
    return f"{begin}*{end}", [name[len(begin) : len(name) - len(end)] for name in names]


def _axes(axes: Any, points: Sequence[Point], test: SpeedTest) -> None:
    axes.set_xlabel("size of the file, MiB")
    axes.set_ylabel(f"{test_words(test)}, tokens/s")
    axes.grid(alpha=0.25)
    _scale(axes.xaxis, axes.set_xscale, axes.set_xlim, [point.mib for point in points])
    _scale(axes.yaxis, axes.set_yscale, axes.set_ylim, [end for point in points for end in _ends(point)])


def _scale(axis: Any, scale: Callable[[str], Any], limits: Callable[[float, float], Any], values: list[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    if high > WIDE * low > 0:
        scale("log")
        limits(low / 1.4, high * 1.4)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    else:
        margin = 0.15 * (high - low) + max(0, NARROW * high - (high - low)) / 2
        limits(max(0, low - margin), high + margin)


def _ends(point: Point) -> tuple[float, float, float]:
    return point.rate.estimate.low, point.rate.estimate.median, point.rate.estimate.high


def _draw_points(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Markers and intervals; colour is the divergence on a logarithmic scale, grey where it is unknown."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    known = [point.kld for point in points if point.kld]  # no logarithm of 0: it takes the colour of the least
    known = known or [1e-6 for point in points if point.kld is not None]
    colours: list[Any] = [UNKNOWN] * len(points)
    if known:
        least, most = min(known), max(known)
        if most < 2 * least:  # one value, or as good as one: a scale still needs two ends
            least, most = least / 2, most * 2
        norm, palette = LogNorm(least, most, clip=True), colormaps["viridis_r"]
        colours = [UNKNOWN if p.kld is None else palette(norm(max(p.kld, least))) for p in points]
        figure.colorbar(
            ScalarMappable(norm=norm, cmap=palette), ax=axes, pad=0.02, label="mean KL divergence from the origin, nats"
        )
    for point, colour in zip(points, colours, strict=True):
        low, median, high = _ends(point)
        bars = [[median - low], [high - median]]
        axes.errorbar([point.mib], [median], yerr=bars, fmt="none", ecolor="0.25", elinewidth=1, capsize=4, zorder=2)
        axes.scatter([point.mib], [median], s=60, color=[colour], edgecolors="0.15", linewidths=0.8, zorder=3)


def _small_print(result: BenchResult, points: Sequence[Point]) -> list[str]:
    """What the picture holds under, and what is not in it."""
    lines = ["Dot: median; bar: interval that holds the true median."]
    if any(not point.rate.steady for point in points):
        lines[0] += f" {UNSTEADY}: did not settle, wider than asked for."
    if any(point.kld is None for point in points):
        lines[0] += " Grey: divergence not known."
    names = short_names([artifact.path for artifact in result.artifacts])
    absent = [name for name in names.values() if name not in {point.name for point in points}]
    if absent:
        lines.append(f"Not drawn, because it was not measured: {', '.join(absent)}.")
    affected = [artifact for artifact in result.artifacts if artifact.disturbance and artifact.disturbance.lines]
    if affected:
        who = ", ".join(names[artifact.path] for artifact in affected)
        lines.append(f"The machine was busy with something else while these ran: {who}.")
    return [piece for line in [*lines, conditions(result)] for piece in textwrap.wrap(line, 158)]


# ---- labels


def _label(figure: Any, axes: Any, points: Sequence[Point], labels: Sequence[str]) -> None:
    """Labels beside their dots, each at the nearest place where it covers nothing; a line leads to those far away."""
    pixels = figure.dpi / 72
    taken = [rectangle for point in points for rectangle in _marks(axes, point, pixels)]
    inside = axes.get_window_extent()
    frame = (inside.x0, inside.y0, inside.x1, inside.y1)
    for point, label in zip(points, labels, strict=True):
        place = (point.mib, point.rate.estimate.median)
        text = " ".join(filter(None, [label, "" if point.rate.steady else UNSTEADY]))
        note = axes.annotate(text, place, (0, 0), textcoords="offset points", fontsize=8, parse_math=False)
        own, at = note.get_window_extent(), axes.transData.transform(place)
        dx, dy = _nearest_place(at, own.width, own.height, taken, frame, pixels)
        note.set_position((dx / pixels, dy / pixels))
        box = (at[0] + dx, at[1] + dy, at[0] + dx + own.width, at[1] + dy + own.height)
        taken.append(box)
        near = (min(max(at[0], box[0]), box[2]), min(max(at[1], box[1]), box[3]))
        if math.dist(at, near) > 14 * pixels:
            end = axes.transData.inverted().transform(near)
            axes.plot(*zip(place, end, strict=True), color="0.6", linewidth=0.6, zorder=1)


def _marks(axes: Any, point: Point, pixels: float) -> Iterable[Rectangle]:
    """The room that a dot and its interval take."""
    low, median, high = (axes.transData.transform((point.mib, value)) for value in _ends(point))
    dot, cap = 5 * pixels, 4 * pixels
    yield median[0] - dot, median[1] - dot, median[0] + dot, median[1] + dot
    yield low[0] - cap, low[1] - pixels, high[0] + cap, high[1] + pixels


def _nearest_place(
    at: Sequence[float], wide: float, high: float, taken: Sequence[Rectangle], frame: Rectangle, pixels: float
) -> tuple[float, float]:
    """Offset of a label's lower left corner from its dot: the first of growing rings that covers least."""
    places = []
    for distance, (side, level) in product((7, 14, 24, 36, 52, 72, 96), product((1, -1, 0), (0.5, 1, -1))):
        reach = distance * pixels
        dx = reach if side > 0 else -reach - wide if side < 0 else -wide / 2
        dy = -high / 2 if level == 0.5 else reach * 0.6 if level > 0 else -reach * 0.6 - high
        if side == 0 and level == 0.5:
            continue  # on the dot itself
        if side == 0:
            dy = reach if level > 0 else -reach - high
        box = (at[0] + dx, at[1] + dy, at[0] + dx + wide, at[1] + dy + high)
        covered = sum(_overlap(box, other) for other in taken) + 2 * (wide * high - _overlap(box, frame))
        places.append((round(covered), (dx, dy)))  # whole pixels: a rounding error is no reason to go further away
    return min(places, key=lambda place: place[0])[1]  # the nearest of equals: min keeps the first


def _overlap(one: Rectangle, other: Rectangle) -> float:
    """Pixels that two rectangles share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0
