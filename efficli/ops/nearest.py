"""The nearest value that a block can hold for a column or a group of them, its scales given, for many rows at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from efficli.ops.blocks import Blocks, grid, levels

Matrix = NDArray[np.float32]
Codes = NDArray[np.uint32]

Chooser = Callable[[int, Matrix, Matrix, Codes], tuple[Codes, Matrix]]
"""(number of the unit in the order of rounding, wanted values (columns of a unit, r), metric (columns, columns), its
codes now (codes of a unit, r)) -> its codes, and their values (columns of a unit, r)."""


def chooser(blocks: Blocks, units: NDArray[np.intp]) -> Chooser:
    """What rounds these rows; `units[i]` is the number of the i-th unit of columns that is rounded."""
    if blocks.layout.group > 1:
        return _vectors(blocks, units)
    uniform = np.array_equal(np.diff(np.sort(levels(blocks.layout.name))), np.ones((1 << blocks.layout.code_bits) - 1))
    return _uniform(blocks, units) if uniform else _listed(blocks, units)


def _scales(blocks: Blocks) -> tuple[Matrix, Matrix, Matrix]:
    """Scales, their inverses (0 of 0) and offsets (runs, r)."""
    scales = np.ascontiguousarray(blocks.scales.T)
    offsets = np.zeros_like(scales) if blocks.offsets is None else np.ascontiguousarray(blocks.offsets.T)
    inverses = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    return scales, inverses, offsets


def _uniform(blocks: Blocks, units: NDArray[np.intp]) -> Chooser:
    """Codes that count up: one rounding. A run with scale 0 keeps its codes."""
    scales, inverses, offsets = _scales(blocks)
    known = levels(blocks.layout.name)
    # Q8_0's encoder never writes -128
    low, high = max(float(known.min()), -127.0), float(known.max())
    lowest, mask = int(known[0]), len(known) - 1
    runs = units // blocks.layout.run

    def choose(number: int, want: Matrix, metric: Matrix, codes: Codes) -> tuple[Codes, Matrix]:
        run = runs[number]
        level = np.rint((want[0] + offsets[run]) * inverses[run])
        np.clip(level, low, high, out=level)
        values = level * scales[run] - offsets[run]
        new = (level.astype(np.int32) - lowest).astype(np.uint32) & np.uint32(mask)
        return np.where(scales[run] == 0, codes, new), values[None]

    return choose


def _listed(blocks: Blocks, units: NDArray[np.intp]) -> Chooser:
    """Codes with a table of rising levels: the nearest by the middles between them."""
    scales, inverses, _ = _scales(blocks)
    known = levels(blocks.layout.name)
    middles = (known[1:] + known[:-1]) / 2
    runs = units // blocks.layout.run

    def choose(number: int, want: Matrix, metric: Matrix, codes: Codes) -> tuple[Codes, Matrix]:
        run = runs[number]
        new = np.searchsorted(middles, want[0] * inverses[run]).astype(np.uint32)
        new = np.where(scales[run] == 0, codes[0], new)
        return new[None], (known[new] * scales[run])[None]

    return choose


def _vectors(blocks: Blocks, units: NDArray[np.intp]) -> Chooser:
    """Vectors of a grid: the nearest by the metric, over all of the grid, for the likeliest patterns of signs.

    Two vectors of 4 that share a stored parity are chosen together: the first as if the second were free, then the
    second given the first.
    """
    layout = blocks.layout
    parts, group = layout.unit_columns // layout.group, layout.group
    scales = np.ascontiguousarray(blocks.scales.T)
    runs = units * layout.unit_columns // layout.run
    search = _Search(grid(layout.name))
    weights = (1 << np.arange(group, dtype=np.uint32))[:, None]

    def choose(number: int, want: Matrix, metric: Matrix, codes: Codes) -> tuple[Codes, Matrix]:
        scale = scales[runs[number]]
        least = np.full(len(scale), np.inf, np.float32)
        index, minus, values = np.zeros_like(codes), want < 0, np.zeros_like(want)
        for signs in _sign_patterns(want, metric, scale, layout.parity):
            turned = np.where(signs, -scale, scale)
            found, tried = np.empty_like(index), np.empty_like(want)
            for part in range(parts):
                here, rest = slice(part * group, (part + 1) * group), slice((part + 1) * group, None)
                own, aim = _free(metric, here, rest), want[here]
                if part:
                    before = slice(0, part * group)
                    aim = aim + np.linalg.solve(metric[here, here], metric[here, before] @ (want - tried)[before])
                found[part], tried[here] = search.nearest(aim, own, turned[here])
            miss = want - tried
            cost = ((metric @ miss) * miss).sum(axis=0)
            better = cost < least
            least = np.where(better, cost, least)
            index, values = np.where(better, found, index), np.where(better, tried, values)
            minus = np.where(better, signs, minus)
        bits = (minus.reshape(parts, group, -1) * weights).sum(axis=1).astype(np.uint32)
        return np.where(scale == 0, codes, index | (bits << np.uint32(layout.index_bits))), values

    return choose


def _free(metric: Matrix, here: slice, rest: slice) -> Matrix:
    """The metric of some elements where those after them make up for their errors: the Schur complement."""
    own, across, later = metric[here, here], metric[here, rest], metric[rest, rest]
    return own if not later.size else own - across @ np.linalg.solve(later, across.T)


class _Search:
    """The entry v of a grid with the least (want - scale v) M (want - scale v)^T, by one matrix product."""

    def __init__(self, known: Matrix) -> None:
        self.known = known
        self.pairs = np.triu_indices(known.shape[1], 1)
        self.products = known[:, self.pairs[0]] * known[:, self.pairs[1]]

    def nearest(self, want: Matrix, metric: Matrix, scale: Matrix) -> tuple[Codes, Matrix]:
        """For `want` (group, r), where `scale` (group, r) has the signs -> entries (r,), values (group, r)."""
        squares = self.known**2 @ metric.diagonal()
        features = np.hstack([squares[:, None], self.products, self.known])
        across = 2 * metric[self.pairs][:, None] * scale[self.pairs[0]] * scale[self.pairs[1]]
        rows = np.vstack([scale[:1] ** 2, across, -2 * scale * (metric @ want)])
        index = (rows.T @ features.T).argmin(axis=1).astype(np.uint32)
        return index, self.known[index].T * scale


def _sign_patterns(want: Matrix, metric: Matrix, scale: NDArray[np.float32], parity: bool) -> list[NDArray[np.bool_]]:
    """Patterns (unit, r) to try, True for minus: those of the values wanted, and with the smallest values turned.

    With `parity` only those with an even number of minus signs.
    """
    minus = (want < 0) ^ (scale < 0)
    weak = np.argsort(np.abs(want) * np.sqrt(metric.diagonal())[:, None], axis=0)[:3]
    rows = np.arange(want.shape[1])
    always = np.ones(want.shape[1], np.bool_)
    odd = (minus.sum(axis=0) & 1).astype(np.bool_)

    def turned(*turns: tuple[int, NDArray[np.bool_]]) -> NDArray[np.bool_]:
        signs = minus.copy()
        for number, where in turns:
            signs[weak[number], rows] ^= where
        return signs

    if not parity:
        return [minus, turned((0, always)), turned((1, always))]
    return [turned((0, odd)), turned((0, ~odd), (1, always)), turned((0, ~odd), (2, always))]
