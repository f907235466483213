"""Walk the matrices of a checkpoint, one in memory at a time, and replace each by what a method makes of it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.reader import FLOATS, to_float32
from efficli.checkpoint.writer import NewTensor, as_stored, copied, write_checkpoint
from efficli.errors import CheckpointError, UsageError, did_you_mean
from efficli.method import Context, Leave, Outcome, TensorConfig, TensorSolver
from efficli.surgery import BLOCK_LINEARS, Matrix, matrices


def run(
    solve: TensorSolver, leave: Leave | None, ckpt: Checkpoint, folder: Path, config: TensorConfig, context: Context
) -> Outcome:
    """Write a checkpoint into the empty `folder` whose chosen matrices are what `solve` makes of them.

    A matrix for which `leave` has a reason is copied, and that is a row of the report. UsageError: a pattern of
    `include` or `exclude` matches no matrix, or nothing is left to do.
    """
    chosen = choose(matrices(ckpt), config)
    reasons = {name: leave(m.rows, m.columns, config) if leave else None for name, m in chosen.items()}
    errors: dict[str, float] = {}
    work = {
        name: partial(_solved, ckpt, matrix, partial(solve, statistics=None, config=config, context=context), errors)
        for name, matrix in chosen.items()
        if reasons[name] is None
    }
    if not work:
        first = next(reason for reason in reasons.values() if reason)
        raise UsageError(f"nothing to do: all {len(reasons)} matrices stay as they are ({first})")
    tensors = [
        NewTensor(name=t.name, dtype=t.dtype, shape=t.shape, source=t.name, content=work[t.name])
        if t.name in work
        else copied(t)
        for t in ckpt.tensors.values()
    ]
    written = write_checkpoint(ckpt, folder, tensors, headers_only=context.headers_only, progress=context.progress)
    rows = [f"{len(work)} of {len(chosen)} matrices changed{_difference(errors)}", *_left(reasons), *written.notes]
    return Outcome(report=tuple(rows), packed=written.packed)


def choose(found: Mapping[str, Matrix], config: TensorConfig) -> dict[str, Matrix]:
    """The matrices that `include` and `exclude` name; without `include` the linear layers of all blocks."""
    for key, patterns in (("include", config.include), ("exclude", config.exclude)):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in found):
                raise UsageError(
                    f"{key}: {pattern!r} matches none of {len(found)} matrices",
                    hint=did_you_mean(pattern, found) or f"the first is called {next(iter(found))}",
                )
    chosen = {}
    for name, matrix in found.items():
        wanted = any(re.search(p, name) for p in config.include) or (
            not config.include and matrix.role in BLOCK_LINEARS
        )
        if wanted and not any(re.search(p, name) for p in config.exclude):
            chosen[name] = matrix
    if not chosen:
        raise UsageError("exclude: leaves no matrix to work on")
    return chosen


def _solved(
    ckpt: Checkpoint,
    matrix: Matrix,
    solve: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    errors: dict[str, float],
) -> Iterator[NDArray[Any]]:
    """The new values of a tensor as stored, one expert after the other; `errors` gets its relative Frobenius error."""
    dtype = ckpt.tensors[matrix.name].dtype
    if dtype not in FLOATS:
        raise CheckpointError(f"dtype {dtype}, expected F32, BF16, F16 or F64", where=matrix.name)
    lost = total = 0.0
    for index in range(matrix.count):
        if matrix.stacked:
            old = to_float32(ckpt.read_rows(matrix.name, index, index + 1)[0], dtype)
        else:
            old = ckpt.read(matrix.name)
        if not np.isfinite(old).all():
            raise CheckpointError("holds NaN or infinite values", where=matrix.name)
        new = solve(old.T if matrix.transposed else old)
        new = new.T if matrix.transposed else new
        if new.shape != old.shape:
            raise ValueError(f"{matrix.name}: {new.shape} for {old.shape}")
        lost += float(np.sum(np.square(new - old, dtype=np.float64)))
        total += float(np.sum(np.square(old, dtype=np.float64)))
        yield as_stored(new, dtype, matrix.name)
    errors[matrix.name] = math.sqrt(lost / total) if total else 0.0


def _difference(errors: Mapping[str, float]) -> str:
    """By how much, for a row of the report."""
    if not errors:
        return ""
    worst = max(errors, key=lambda name: errors[name])
    mean = sum(errors.values()) / len(errors)
    return f"; relative Frobenius error {mean:.2%} on average, {errors[worst]:.2%} at most ({worst})"


def _left(reasons: Mapping[str, str | None]) -> list[str]:
    """A row for each reason and kind of matrix, whatever the number of layers."""
    counts = Counter((_any_layer(name), reason) for name, reason in reasons.items() if reason)
    return [f"{name} ({count}): left as it is: {reason}" for (name, reason), count in counts.items()]


def _any_layer(name: str) -> str:
    """The name with `*` for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
