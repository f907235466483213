"""Scales for folds: those that leave the least error in the outputs once the scaled matrices are quantized.

Of AWQ (Lin et al. 2023, arXiv:2306.00978, section 3.2), with a grid over the exponents of the input's and of the
weights' size (the latter as in SmoothQuant, Xiao et al. 2022, arXiv:2211.10438, equation 4):

    s_j = rms(x_j)^a / rms(W_:j)^b, geometric mean 1          a = 0, 0.05 ... 1; b = 0, 0.5, 1
    error(s) = sum over the matrices W that share s of tr(E H E^T),  E = Q(W diag(s)) diag(1/s) - W,  H = mean(x x^T)

Q is ggml's own encoder on a sample of rows. s = 1 is among the candidates. Experts are counted with the diagonal of H
and by how many tokens they see. Folds are independent of each other: s of one scales rows of the next one's matrix,
which are quantized each on its own. From the best of the grid each channel's own scale is searched (`descent`), on all
rows; matrices of experts, and heads that do not fill the type's blocks, keep the grid's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint, open_checkpoint
from efficli.folding import Fold, find_folds
from efficli.network.model import Network
from efficli.network.statistics import Statistic, in_passes
from efficli.ops import ggml
from efficli.ops.child import run_child
from efficli.precision.curves import Rows, row_reader
from efficli.precision.descent import Descent, descends
from efficli.precision.view import Part
from efficli.progress import Progress
from efficli.surgery import Matrix, matrices

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

Method = Literal["grid", "channels"]
"""Exponents only, or each channel's scale from there."""

INPUT_EXPONENTS = tuple(i / 20 for i in range(21))
WEIGHT_EXPONENTS = (0.0, 0.5, 1.0)
SAMPLED_WEIGHTS = 1 << 17
"""Of a matrix; a smaller one is encoded whole."""
MOST_EXPERTS = 8
"""Of a layer whose matrices are looked at for scales that all of them share."""
MEMORY_BYTES = 2 << 30
"""Of sums x xᵀ that are held at once."""
LEAST_SIZE = 0.01
"""A channel counts as this share of the median one at least: what calibration hardly saw must stay usable."""
_RUN = 8
SCALES, FOUND = "scales.npz", "scales.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the search chose for one fold."""

    scales: Float64
    input_exponent: float = 0.0
    weight_exponent: float = 0.0
    before: float = 0.0
    """Error without scales."""
    after: float = 0.0
    why: str = ""
    """Why nothing was searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Rows of a matrix and what they are given."""

    rows: Float32
    share: float
    """How many rows, or matrices, each stands for."""
    hessian: Float32
    """mean(x xᵀ) (columns, columns), or its diagonal (columns,)."""
    squares: Float64
    """mean(x²), for the encoder's importance."""


def choose_scales(
    root: Path,
    folds: Sequence[int],
    chunks: Sequence[Sequence[int]],
    folder: Path,
    *,
    kind: str,
    imatrix: bool,
    method: Method,
    threads: int,
    progress: Progress,
) -> dict[int, Found]:
    """Scales of the folds of these numbers (in `find_folds`) of the checkpoint in `root`, by a child process.

    `chunks`: token ids to compute statistics on; `kind`: ggml's type that matrices will be encoded to, with an
    importance matrix or without; `folder`: for the child's files.
    """
    argument = {
        "root": str(root.absolute()),
        "folds": list(folds),
        "chunks": [list(chunk) for chunk in chunks],
        "kind": kind,
        "imatrix": imatrix,
        "method": method,
        "threads": threads,
        "out": str(folder.absolute()),
    }
    run_child("efficli.precision.scales:serve", argument, what="choosing scales", progress=progress)
    return read_scales(folder)


def read_scales(folder: Path) -> dict[int, Found]:
    """What `serve` wrote, in the order of the folds."""
    told: dict[str, dict[str, Any]] = json.loads((folder / FOUND).read_text())
    with np.load(folder / SCALES) as stored:
        return {int(number): Found(scales=stored[number], **one) for number, one in told.items()}


def serve(argument: Mapping[str, Any], progress: Progress) -> None:
    """The child's part of `choose_scales`."""
    # what its configuration says of code was judged by the parent; none is run
    ckpt = open_checkpoint(argument["root"], trust_remote_code=True)
    network = Network(ckpt, threads=argument["threads"])
    folds = {number: find_folds(ckpt)[0][number] for number in argument["folds"]}
    found: dict[int, Found] = {}
    told = _Search(ckpt, argument["kind"], argument["imatrix"], argument["threads"])
    for number, samples, sizes in _inputs(network, folds, told, argument["chunks"], progress):
        found[number] = told.best(folds[number], samples, sizes)
        if argument["method"] == "channels":
            found[number] = told.refined(folds[number], samples, found[number])
    for number, fold in folds.items():
        if number not in found:
            found[number] = Found(scales=np.ones(fold.width), why="the calibration text never reaches it")
    names = ("input_exponent", "weight_exponent", "before", "after", "why")
    rows = {str(number): {name: getattr(one, name) for name in names} for number, one in sorted(found.items())}
    folder = Path(argument["out"])
    np.savez(folder / SCALES, allow_pickle=False, **{str(number): one.scales for number, one in found.items()})
    (folder / FOUND).write_text(json.dumps(rows, indent=1))


def _inputs(
    network: Network, folds: Mapping[int, Fold], told: _Search, chunks: Sequence[Sequence[int]], progress: Progress
) -> Iterator[tuple[int, list[Sample], Float64]]:
    """(number of a fold, samples of its matrices, mean(x²) of its columns), as statistics come in."""
    waiting = dict(folds)
    plain = {number: fold.multiplied[0].tensor for number, fold in folds.items() if not _has_experts(fold)}
    hessians = {name for name in plain.values() if name in network.matrices and name not in network.unwatched}
    squares: dict[str, Statistic] = {}
    for pack in in_passes(network, chunks, hessians=hessians, memory_bytes=MEMORY_BYTES, progress=progress):
        squares |= {name: Statistic(one.squares, one.counts) for name, one in pack.items()}
        for number, fold in list(waiting.items()):
            leader = fold.multiplied[0].tensor
            statistic = pack.get(leader)
            if statistic is None or (number in plain and statistic.gram is None):
                continue
            del waiting[number]
            if number in plain and statistic.counts[0]:
                samples = told.plain(fold, statistic)
                yield number, samples, statistic.squares[0] / statistic.counts[0]
            elif number not in plain:
                index = fold.multiplied[0].index or 0
                experts = told.experts(fold, squares)
                if experts:
                    yield number, experts, statistic.squares[index] / max(1, statistic.counts[index])


def _has_experts(fold: Fold) -> bool:
    return any(one.role.startswith("expert") for one in fold.multiplied)


class _Search:
    """The grid search on one checkpoint."""

    def __init__(self, ckpt: Checkpoint, kind: str, imatrix: bool, threads: int) -> None:
        self._matrices: Mapping[str, Matrix] = matrices(ckpt)
        self._read: Rows = row_reader(ckpt, self._matrices)
        self._kind, self._imatrix, self._threads = kind, imatrix, threads
        self._pool = ThreadPoolExecutor(threads)
        ggml.prepare(kind)

    def plain(self, fold: Fold, statistic: Statistic) -> list[Sample]:
        """Samples of matrices that all see the same input, whose x xᵀ is known."""
        assert statistic.gram is not None
        count = float(statistic.counts[0])
        gram = statistic.gram[0] / np.float32(count)
        squares = statistic.squares[0] / count
        found = []
        for one in fold.multiplied:
            rows, share = self._sample(one.tensor, 0)
            found.append(Sample(rows=rows, share=share, hessian=gram, squares=squares))
        return found

    def experts(self, fold: Fold, squares: Mapping[str, Statistic]) -> list[Sample]:
        """Samples of experts that saw something, as often as they did; a router stays as it is in every file."""
        found: list[tuple[str, int]] = []
        for one in fold.multiplied:
            if one.role != "router" and one.tensor in squares:
                wanted = range(self._matrices[one.tensor].count) if one.index is None else (one.index,)
                found += [(one.tensor, i) for i in wanted if squares[one.tensor].counts[i]]
        by_role = len({one.role for one in fold.multiplied} - {"router"})
        chosen = found[:: max(1, len(found) // (MOST_EXPERTS * by_role))]
        samples = []
        for name, index in chosen:
            rows, share = self._sample(name, index)
            sums, count = squares[name].squares[index], float(squares[name].counts[index])
            weighted = (sums * (len(found) / len(chosen))).astype(np.float32)
            samples.append(Sample(rows=rows, share=share, hessian=weighted, squares=sums / count))
        return samples

    def best(self, fold: Fold, samples: Sequence[Sample], squares: Float64) -> Found:
        """The candidate of least error; scales of 1 where none is better."""
        inputs = _size(fold.pooled(squares))
        columns = np.zeros(len(squares))
        for sample in samples:
            columns += sample.share * np.square(sample.rows, dtype=np.float64).sum(0)
        weights = _size(fold.pooled(columns))
        pairs = [(a, b) for b in WEIGHT_EXPONENTS for a in INPUT_EXPONENTS]

        errors = [self.error(fold, samples, _normal(inputs, weights, *pair)) for pair in pairs]
        least = min(range(len(pairs)), key=lambda i: (errors[i], i))
        a, b = pairs[least]
        return Found(
            scales=_normal(inputs, weights, a, b),
            input_exponent=a,
            weight_exponent=b,
            before=errors[0],
            after=errors[least],
        )

    def refined(self, fold: Fold, samples: Sequence[Sample], found: Found) -> Found:
        """What a search channel by channel makes of it; the same where there is none."""
        block = ggml.block_size(self._kind)
        if _has_experts(fold) or not descends(fold, block):
            return found
        whole = [self._whole(one.tensor) for one in fold.multiplied]
        descent = Descent(fold, whole, samples[0].hessian, block, self._quantized, imatrix=self._imatrix)
        ones = np.ones(fold.width)
        before = descent.total(ones)
        start = found.scales if descent.total(found.scales) < before else ones
        scales, after = descent.run(start)
        return replace(found, scales=scales, before=before, after=after)

    def error(self, fold: Fold, samples: Sequence[Sample], scales: Float64) -> float:
        """The mean square error of the outputs with these scales, summed over them."""
        by, total = fold.columns(scales).astype(np.float32), 0.0
        for sample in samples:
            importance = (sample.squares / np.square(by)).astype(np.float32) if self._imatrix else None
            error = self._quantized(sample.rows * by, importance) / by - sample.rows
            if sample.hessian.ndim == 1:
                found = float(np.square(error, dtype=np.float64).sum(0) @ sample.hessian)
            else:
                found = float(np.vdot(error @ sample.hessian, error))
            total += sample.share * found
        return total

    def _whole(self, name: str) -> Float32:
        """A matrix that is no stack."""
        rows = self._matrices[name].rows
        return self._read(Part(name=name, index=0, start=0, stop=rows), 0, rows)

    def _quantized(self, rows: Float32, importance: Float32 | None) -> Float32:
        """`quantized`, slabs of rows side by side."""
        step = -(-len(rows) // self._threads)
        slabs = [rows[start : start + step] for start in range(0, len(rows), step)]
        return np.concatenate(list(self._pool.map(lambda slab: quantized(self._kind, slab, importance), slabs)))

    def _sample(self, name: str, index: int) -> tuple[Float32, float]:
        """Rows of a matrix, spread evenly over it, and how many rows of it each of them stands for."""
        matrix = self._matrices[name]
        part = Part(name=name, index=index, start=0, stop=matrix.rows)
        budget = max(_RUN, SAMPLED_WEIGHTS // matrix.columns)
        if matrix.rows <= budget:
            return self._read(part, 0, matrix.rows), 1.0
        starts = np.linspace(0, matrix.rows - _RUN, max(1, budget // _RUN)).astype(int)
        rows = np.concatenate([self._read(part, int(start), int(start) + _RUN) for start in starts])
        return rows, matrix.rows / len(rows)


def quantized(kind: str, rows: Float32, importance: Float32 | None) -> Float32:
    """What ggml's type leaves of rows (r, c)."""
    rows = np.ascontiguousarray(rows)
    if importance is None and kind in ggml.NEEDS_IMATRIX:
        importance = np.ones(rows.shape[1], np.float32)
    out = np.empty(len(rows) * ggml.row_bytes(kind, rows.shape[1]), np.uint8)
    ggml.encode(kind, rows, out, importance)
    return ggml.decode(kind, out, *rows.shape)


def _size(squares: Float64) -> Float64:
    """Root of mean squares, none far below the median."""
    sizes = np.sqrt(squares)
    least = LEAST_SIZE * float(np.median(sizes)) or LEAST_SIZE * float(sizes.mean())
    found: Float64 = np.maximum(sizes, least) if least else np.ones_like(sizes)
    return found


def _normal(inputs: Float64, weights: Float64, a: float, b: float) -> Float64:
    """inputs^a / weights^b with geometric mean 1."""
    logs = a * np.log(inputs) - b * np.log(weights)
    scales: Float64 = np.exp(logs - logs.mean())
    return scales
