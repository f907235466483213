"""Rounding with error feedback on the grid that ggml's quantizer chose: the same bytes, a smaller error of the layer.

The layer's error on calibration inputs x is tr(E H E^T), with E = W - Q and H = sum x x^T. Columns are rounded one
after another (groups of 4 or 8 for vector types), each aiming at its weight plus what makes up best for the errors
already made; the scales stay. This is GPTQ (Frantar et al. 2022, arXiv:2210.17323), in the form of LDLQ (Chee et al.
2023, arXiv:2307.13304, eq. 5): with H = R R^T, R upper triangular, tr(E H E^T) = |E R|^2, so column k aims at

    w_k + sum over j < k of e_j R_jk / R_kk

For groups R_kk is a block and its metric R_kk R_kk^T decides which vector is nearest (block LDLQ of QuIP#, Tseng et al.
2024, arXiv:2402.04396, algorithm 1, which takes the Euclidean one). Afterwards passes of coordinate descent choose
each code anew, given all others: none of them makes the error larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from efficli.ops import ggml
from efficli.ops.blocks import SCALAR_TYPES, VECTOR_TYPES, Blocks, unpack
from efficli.ops.nearest import Chooser, chooser

ROUNDED_TYPES = (*SCALAR_TYPES, *VECTOR_TYPES)
"""The types that `round_with_feedback` can do."""

Order = Literal["natural", "diagonal"]
"""Columns as they come, or by falling diagonal of H ("act-order")."""

Matrix = NDArray[np.float32]

PASSES = 4
"""Passes of coordinate descent, at most: on the reference model the first gains 4 to 8 % beyond feedback, three more
2 to 4 %, and 16 more less than 1 %; as much on text that H was not made from."""

_LAZY = 128
"""Columns whose feedback onto later ones is computed together, by one matrix product."""

_ROWS = 4096
"""Rows rounded at once; they do not depend on each other."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """What rounding needs of H, for a group size and an order: shared by matrices with the same input.

    Rows and columns of all of these are in the order of rounding, `order[i]` is the i-th column's number.
    """

    order: NDArray[np.intp]
    factor: Matrix
    """R_jk R_kk^-1 (c, c), upper triangular: which part of column j's error column k makes up for."""
    metrics: Matrix
    """R_kk R_kk^T of each unit (c / unit, unit, unit)."""
    hessian: Matrix
    """The damped H (c, c)."""
    dead: NDArray[np.bool_]
    """Columns that were never used: H_jj = 0."""
    damping: float
    """What was added to the diagonal of H."""


def damped(hessian: NDArray[np.floating], damp: float) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """H + damp × (its mean diagonal) on the diagonal, R with R R^T equal to it, and what was added.

    The damping grows by factors of 10 until the factorization succeeds. ValueError if H has values that are not
    finite, or a negative diagonal.
    """
    matrix = np.asarray(hessian, np.float64)
    diagonal = matrix.diagonal()
    if not np.isfinite(matrix).all() or np.any(diagonal < 0):
        raise ValueError("the Hessian has values that are not finite or a negative diagonal")
    mean = float(diagonal.mean()) or 1.0
    while True:
        added = damp * mean
        raised = matrix + added * np.eye(len(matrix))
        try:
            # the Cholesky factor of the reversed matrix, reversed, is upper triangular
            lower = np.linalg.cholesky(raised[::-1, ::-1]).astype(np.float64, copy=False)
        except np.linalg.LinAlgError:
            damp = max(10 * damp, 1e-8)
            continue
        return raised, lower[::-1, ::-1], added


def prepare(hessian: NDArray[np.floating], *, unit: int = 1, order: Order = "natural", damp: float = 0.01) -> Feedback:
    """Factorize H (c, c) once for every matrix with this input; `unit` is the type's `layout.unit_columns`."""
    columns = len(hessian)
    diagonal = hessian.diagonal()
    if order == "diagonal":
        firsts = np.argsort(-diagonal.reshape(-1, unit).sum(axis=1), kind="stable") * unit
        places = (firsts[:, None] + np.arange(unit)).reshape(-1)
    else:
        places = np.arange(columns)
    raised, upper, added = damped(hessian[np.ix_(places, places)], damp)
    parts = upper.reshape(columns // unit, unit, columns // unit, unit)
    own = parts[np.arange(columns // unit), :, np.arange(columns // unit), :]
    shares = np.einsum("jkg,kgh->jkh", upper.reshape(columns, -1, unit), np.linalg.inv(own))
    return Feedback(
        order=places,
        factor=np.ascontiguousarray(shares.reshape(columns, columns), np.float32),
        metrics=(own @ own.transpose(0, 2, 1)).astype(np.float32),
        hessian=raised.astype(np.float32),
        dead=diagonal[places] == 0,
        damping=added,
    )


def round_with_feedback(
    kind: str,
    weight: Matrix,
    hessian: NDArray[np.floating],
    imatrix: Matrix | None = None,
    *,
    damp: float = 0.01,
    order: Order = "diagonal",
    passes: int = PASSES,
    prepared: Feedback | None = None,
) -> NDArray[np.uint8]:
    """Encode `weight` (r, c) as ggml does, then choose its codes anew -> r × row_bytes bytes, no worse for any row.

    `hessian` (c, c) is the sum (or mean) of x x^T, `imatrix` (c,) what ggml's encoder weighs its error with.
    `damp` is added to H's diagonal, as a share of its mean. `passes` bounds the passes of coordinate descent.
    `prepared` is `prepare(hessian, ...)`, where several matrices share an input. Scales, and the codes of columns that
    H says are never used, stay as ggml chose them; so does a row whose tr(E H E^T) would not fall. ValueError if H is
    not (c, c), has values that are not finite or a negative diagonal.
    """
    data = np.empty(len(weight) * ggml.row_bytes(kind, weight.shape[1]), np.uint8)
    ggml.encode(kind, weight, data, imatrix)
    return round_encoded(kind, data, weight, hessian, damp=damp, order=order, passes=passes, prepared=prepared)


def round_encoded(
    kind: str,
    data: NDArray[np.uint8],
    weight: Matrix,
    hessian: NDArray[np.floating],
    *,
    damp: float = 0.01,
    order: Order = "diagonal",
    passes: int = PASSES,
    prepared: Feedback | None = None,
) -> NDArray[np.uint8]:
    """As `round_with_feedback`, for `weight` (r, c) that is encoded already: the bytes `data` with better codes."""
    rows, columns = weight.shape
    if hessian.shape != (columns, columns):
        raise ValueError(f"the Hessian has the shape {hessian.shape}, expected {(columns, columns)}")
    blocks = unpack(kind, data, rows, columns)
    feedback = prepared or prepare(hessian, unit=blocks.layout.unit_columns, order=order, damp=damp)
    plain = np.asarray(hessian, np.float32)[np.ix_(feedback.order, feedback.order)]
    codes = blocks.codes.copy()
    for start in range(0, rows, _ROWS):
        stop = min(start + _ROWS, rows)
        codes[start:stop] = _round_rows(weight[start:stop], blocks.part(start, stop), feedback, plain, passes)
    return blocks.pack(codes)


def _round_rows(weight: Matrix, blocks: Blocks, feedback: Feedback, plain: Matrix, passes: int) -> NDArray[np.uint32]:
    """The codes of some rows: feedback, descent, and ggml's own where they are no better."""
    group = blocks.layout.group
    unit = blocks.layout.unit_columns
    groups = feedback.order[::group] // group
    choose = chooser(blocks, feedback.order[::unit] // unit)
    target = np.ascontiguousarray(weight.T[feedback.order])
    before = blocks.codes.T[groups]
    first = target - blocks.decode(blocks.codes).T[feedback.order]
    codes = before.copy()
    error = _feed_back(target, feedback, choose, codes)
    worse = row_losses(error, feedback.hessian) >= row_losses(first, feedback.hessian)
    codes[:, worse], error[:, worse] = before[:, worse], first[:, worse]
    for _ in range(passes):
        if not _descend(target, error, feedback, choose, codes):
            break
    dead = np.repeat(feedback.dead.reshape(-1, unit).all(axis=1), unit // group)
    codes[dead] = before[dead]
    worse = row_losses(error, plain) >= row_losses(first, plain)
    codes[:, worse] = before[:, worse]
    result = np.empty_like(blocks.codes)
    result[:, groups] = codes.T
    return result


def row_losses(error: Matrix, hessian: Matrix) -> NDArray[np.float64]:
    """e H e^T of each row; `error` (c, r) has a column for each."""
    losses: NDArray[np.float64] = np.einsum("cr,cr->r", hessian @ error, error, dtype=np.float64)
    return losses


def _feed_back(target: Matrix, feedback: Feedback, choose: Chooser, codes: NDArray[np.uint32]) -> Matrix:
    """Round each group of columns to what makes up for the errors before it; writes `codes`, gives W - Q (c, r)."""
    columns, unit = len(target), len(feedback.metrics[0])
    each = len(codes) * unit // columns
    factor, error = feedback.factor, np.zeros_like(target)
    for start in range(0, columns, _LAZY):
        stop = min(start + _LAZY, columns)
        aim = target[start:stop] + factor[:start, start:stop].T @ error[:start]
        for at in range(start, stop, unit):
            end = at + unit
            want = aim[at - start : end - start] + factor[start:at, at:end].T @ error[start:at]
            number = at // unit
            places = slice(number * each, (number + 1) * each)
            codes[places], values = choose(number, want, feedback.metrics[number], codes[places])
            error[at:end] = target[at:end] - values
    return error


def _descend(target: Matrix, error: Matrix, feedback: Feedback, choose: Chooser, codes: NDArray[np.uint32]) -> int:
    """Choose each group anew, given all others, where that lowers the damped error; how many codes changed."""
    columns, unit = len(target), len(feedback.metrics[0])
    each = len(codes) * unit // columns
    hessian, changed = feedback.hessian, 0
    slope = hessian @ error
    for start in range(0, columns, _LAZY):
        stop = min(start + _LAZY, columns)
        moved = np.zeros((stop - start, target.shape[1]), np.float32)
        for at in range(start, stop, unit):
            end, number = at + unit, at // unit
            own, places = hessian[at:end, at:end], slice(number * each, (number + 1) * each)
            here = slope[at:end] + hessian[at:end, start:at] @ moved[: at - start]
            best = np.linalg.solve(own, here) if unit > 1 else here / own
            # from the value that is there now, one Newton step
            new, values = choose(number, target[at:end] - error[at:end] + best, own, codes[places])
            step = target[at:end] - values - error[at:end]
            gain = np.einsum("gr,gr->r", 2 * here + own @ step, step)
            better = (gain < 0) & np.any(new != codes[places], axis=0)
            moved[at - start : end - start] = np.where(better, step, 0)
            codes[places] = np.where(better, new, codes[places])
            changed += int(better.sum())
        error[start:stop] += moved
        slope += hessian[:, start:stop] @ moved
    return changed
