"""Scales found channel by channel: one step up or down wherever the quantized outputs come closer to the true ones.

    error(s) = sum over matrices W of tr(E H E^T),   E = Q(W diag(s)) diag(1/s) - W

Each scale is multiplied by a step, then divided by it, and keeps what makes the error smaller. A scale changes codes of
its own block of columns only, so that one channel of every block is tried at once: of block b the error changes by

    2 <D_b, (E H)_b> + <D_b H_bb, D_b>,   D = the change of E

E H is kept exact within blocks, and across them computed anew after a few channels; where these together made the error
larger, they are taken back. All rows take part: what falls is the error of this very rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from efficli.folding import Fold

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Round = Callable[[Float32, Float32 | None], Float32]
"""(rows (r, c), importance (c,) or None) -> what the type leaves of them."""

STEPS = (1.35, 1.2, 1.12, 1.08, 1.05)
CHANNELS = 4
"""Of a block, after which E H is computed anew."""


def descends(fold: Fold, block: int) -> bool:
    """Whether no two blocks of the type share scales with a third: runs of a head fill whole blocks."""
    return fold.width % block == 0 and (fold.repeats == 1 or fold.run % block == 0)


class Descent:
    """The search on one fold; matrices (out, in) whole, their common `gram` mean(x xᵀ)."""

    def __init__(
        self, fold: Fold, matrices: Sequence[Float32], gram: Float32, block: int, rounding: Round, *, imatrix: bool
    ) -> None:
        self._fold, self._gram, self._block, self._round, self._imatrix = fold, gram, block, rounding, imatrix
        self._rows = np.concatenate(list(matrices))
        self._squares = np.diag(gram).copy()
        self._lanes = fold.columns(np.arange(fold.width)) // block
        """Which block of scales a column belongs to."""
        parts = [slice(at, at + block) for at in range(0, gram.shape[0], block)]
        self._within = np.stack([gram[part, part] for part in parts])

    def run(self, scales: Float64, steps: Sequence[float] = STEPS) -> tuple[Float64, float]:
        """Scales from these on, and their error."""
        scales, error = scales.copy(), self._error(scales)
        slope = error @ self._gram
        total = float(np.vdot(slope, error))
        for step in steps:
            for first in range(0, self._block, CHANNELS):
                new = scales.copy()
                changed, slope = error.copy(), slope.copy()
                for channel in range(first, min(first + CHANNELS, self._block)):
                    for factor in (step, 1 / step):
                        self._try(new, changed, slope, channel, factor)
                slope = changed @ self._gram
                found = float(np.vdot(slope, changed))
                if found < total:
                    scales, error, total = new, changed, found
                else:
                    slope = error @ self._gram
        return scales, total

    def total(self, scales: Float64) -> float:
        """The error with these scales."""
        error = self._error(scales)
        return float(np.vdot(error @ self._gram, error))

    def _try(self, scales: Float64, error: Float32, slope: Float32, channel: int, factor: float) -> None:
        """Multiply this channel of every block, and keep it where it helps; all three arrays are changed in place."""
        trial = scales.reshape(-1, self._block).copy()
        trial[:, channel] *= factor
        change = self._error(trial.reshape(-1)) - error
        blocks = change.reshape(len(change), -1, self._block)
        moved = np.matmul(blocks.transpose(1, 0, 2), self._within).transpose(1, 0, 2).reshape(change.shape)
        gains = np.zeros(len(trial))
        np.add.at(gains, self._lanes, np.einsum("rc,rc->c", change, 2 * slope + moved))
        better = gains < 0
        scales.reshape(-1, self._block)[better] = trial[better]
        kept = better[self._lanes]
        error += change * kept
        slope += moved * kept

    def _error(self, scales: Float64) -> Float32:
        by = self._fold.columns(scales).astype(np.float32)
        importance = (self._squares / np.square(by)).astype(np.float32) if self._imatrix else None
        error: Float32 = self._round(self._rows * by, importance) / by - self._rows
        return error
