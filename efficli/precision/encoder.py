"""Matrices of a checkpoint as a file will hold them: encoded by ggml, or rounded anew with error feedback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from efficli.ops import ggml
from efficli.ops.block_layouts import LAYOUTS
from efficli.ops.rounding import ROUNDED_TYPES, Feedback, prepare, round_with_feedback
from efficli.precision.view import FileTensor

Rounding = Literal["nearest", "error-feedback"]

PLAIN = ("F16", "BF16", "F32")
"""Types without blocks."""
_KEPT_FACTORS = 4
"""Factorized Hessians in memory: neighbours in a layer share one."""


class Statistics:
    """What the matrices of a file were given on calibration texts: mean(x²), and, on disk, mean(x xᵀ)."""

    def __init__(
        self,
        squares: Mapping[str, NDArray[np.float32]],
        grams: Mapping[str, Sequence[tuple[Path, int]]] | None = None,
    ) -> None:
        """`squares`: (matrices × columns,) by tensor of the file; `grams`: for each of its matrices a .npy file
        (matrices, columns, columns) and an index in it."""
        self.squares, self.grams = squares, dict(grams or {})

    def imatrix(self, tensor: FileTensor, part: int) -> NDArray[np.float32] | None:
        """mean(x²) of each column of a matrix, or None."""
        found = self.squares.get(tensor.name)
        if found is None:
            return None
        return np.ascontiguousarray(found.reshape(-1, tensor.columns)[part], np.float32)

    def gram(self, tensor: FileTensor, part: int) -> NDArray[np.float32] | None:
        """mean(x xᵀ) (columns, columns) of a matrix, or None; mapped from the disk."""
        if tensor.name not in self.grams:
            return None
        path, index = self.grams[tensor.name][part]
        found: NDArray[np.float32] = np.load(path, mmap_mode="r")[index]
        return found


class Encoder:
    """Encodes matrices to ggml's types, each row on its own."""

    def __init__(self, statistics: Statistics, *, rounding: Rounding = "nearest", threads: int = 1) -> None:
        self.statistics, self.rounding, self._threads = statistics, rounding, threads
        self._factors: dict[tuple[Path, int, int], Feedback] = {}

    def feeds_back(self, tensor: FileTensor, kind: str) -> bool:
        """Whether codes of this type are chosen with error feedback: there is a Hessian, and they can be kept."""
        can = kind in ROUNDED_TYPES and tensor.packable and tensor.name in self.statistics.grams
        return self.rounding == "error-feedback" and can

    def encode(self, tensor: FileTensor, part: int, kind: str, rows: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Rows (r, c) of a matrix -> r × row_bytes bytes."""
        rows = np.ascontiguousarray(rows, np.float32)
        imatrix = self.statistics.imatrix(tensor, part)
        gram = self.statistics.gram(tensor, part) if self.feeds_back(tensor, kind) else None
        if gram is not None and float(np.trace(gram)) > 0:
            return round_with_feedback(kind, rows, gram, imatrix, prepared=self._feedback(tensor, part, kind, gram))
        out = np.empty(len(rows) * ggml.row_bytes(kind, rows.shape[1]), np.uint8)
        ggml.prepare(kind)
        if kind in ggml.NEEDS_IMATRIX and imatrix is None:
            imatrix = np.ones(tensor.columns, np.float32)  # as llama.cpp does for the ends of a model
        size = ggml.row_bytes(kind, rows.shape[1])
        step = max(1, -(-len(rows) // (4 * self._threads)))

        def slab(start: int) -> None:
            ggml.encode(kind, rows[start : start + step], out[start * size : (start + step) * size], imatrix)

        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(slab, range(0, len(rows), step)))
        return out

    def decoded(self, tensor: FileTensor, part: int, kind: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """What a type leaves of rows (r, c)."""
        if kind == "F32":
            return rows
        return ggml.decode(kind, self.encode(tensor, part, kind, rows), *rows.shape)

    def _feedback(self, tensor: FileTensor, part: int, kind: str, gram: NDArray[np.float32]) -> Feedback:
        path, index = self.statistics.grams[tensor.name][part]
        key = (path, index, LAYOUTS[kind].unit_columns)
        if key not in self._factors:
            while len(self._factors) >= _KEPT_FACTORS:
                del self._factors[next(iter(self._factors))]
            self._factors[key] = prepare(np.array(gram), unit=key[2], order="diagonal")
        return self._factors[key]
