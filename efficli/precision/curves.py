"""Error curves: what each type that a tensor can have costs in bytes, and how far it moves the tensor's output.

    mse   sum over rows and columns of mean(x_j²) E_ij²    (E = W - Q(W); without statistics mean(x²) is 1)
    hess  tr(E H Eᵀ), H = mean(x xᵀ)                       the mean square error of the output, correlations and all

Both are estimated on a sample of rows, which ggml's own encoder encodes as it will encode the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.reader import to_float32
from efficli.ops import ggml
from efficli.precision.encoder import Encoder
from efficli.precision.view import FileTensor, Part
from efficli.progress import Progress
from efficli.surgery import Matrix

SAMPLED_WEIGHTS = 1 << 17
"""Weights of a matrix that are encoded for its curve; a smaller matrix is encoded whole."""
_RUN = 8
"""Rows of a sample that lie one after the other, so that reading them is not all seeking."""
_MATRICES = 4
"""Experts of a stack that are looked at: the stack has one type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One type of one tensor."""

    nbytes: int
    """Of the whole tensor in the file, with its alignment."""
    mse: float
    hess: float | None = None
    kld: float | None = None
    """Measured with only this tensor of this type, nats; None where it was not measured."""

    @property
    def error(self) -> float:
        """The best estimate of the error of the tensor's output."""
        return self.mse if self.hess is None else self.hess


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The types of one tensor, and how much the network minds noise in it."""

    points: Mapping[str, Point]
    sensitivity: float | None = None
    """nats of KL divergence for each unit of `Point.error` of Gaussian noise; None where it was not probed."""
    unseen: tuple[str, ...] = field(default=())
    """Matrices or channels that the calibration texts never reached, in words."""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        points = {kind: [p.nbytes, p.mse, p.hess, p.kld] for kind, p in self.points.items()}
        return {"points": points, "sensitivity": self.sensitivity, "unseen": list(self.unseen)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Curve:
        """From what `to_json` gave."""
        points = {
            kind: Point(nbytes=nbytes, mse=mse, hess=hess, kld=kld)
            for kind, (nbytes, mse, hess, kld) in data["points"].items()
        }
        return cls(points=points, sensitivity=data["sensitivity"], unseen=tuple(data["unseen"]))


Rows = Callable[[Part, int, int], NDArray[np.float32]]
"""(part, first, last exclusive) -> those rows of the part's matrix."""


def row_reader(ckpt: Checkpoint, matrices: Mapping[str, Matrix]) -> Rows:
    """Reads rows of a checkpoint's matrices as (out, in), float32."""

    def read(part: Part, first: int, last: int) -> NDArray[np.float32]:
        matrix, dtype = matrices[part.name], ckpt.tensors[part.name].dtype
        first, last = part.start + first, part.start + last
        if matrix.stacked or matrix.transposed:
            raw = ckpt.read_rows(part.name, part.index, part.index + 1)[0] if matrix.stacked else None
            whole = ckpt.read(part.name) if raw is None else to_float32(raw, dtype)
            return np.ascontiguousarray((whole.T if matrix.transposed else whole)[first:last])
        return np.ascontiguousarray(to_float32(ckpt.read_rows(part.name, first, last), dtype))

    return read


def curve(tensor: FileTensor, kinds: Sequence[str], read: Rows, encoder: Encoder) -> Curve:
    """The curve of one tensor over the types `kinds`, all of which its rows can have."""
    step = max(1, len(tensor.parts) // _MATRICES)
    chosen = range(0, len(tensor.parts), step)
    sums: dict[str, list[float]] = {kind: [0.0, 0.0] for kind in kinds}
    exact = True
    for part in chosen:
        rows, share = _sample(tensor, part, read)
        share *= len(tensor.parts) / len(chosen)
        weights = encoder.statistics.imatrix(tensor, part)
        gram = encoder.statistics.gram(tensor, part)
        exact = exact and gram is not None
        for kind in kinds:
            error = encoder.decoded(tensor, part, kind, rows) - rows
            squares = np.square(error, dtype=np.float64).sum(0)
            sums[kind][0] += share * float(squares @ weights if weights is not None else squares.sum())
            if gram is not None:
                sums[kind][1] += share * float(np.einsum("rc,rc->", error @ gram, error, dtype=np.float64))
    return Curve(
        points={
            kind: Point(nbytes=nbytes(tensor, kind), mse=mse, hess=max(0.0, hess) if exact else None)
            for kind, (mse, hess) in sums.items()
        },
        unseen=tuple(_unseen(tensor, encoder)),
    )


def curves(
    tensors: Sequence[FileTensor],
    legal: Mapping[str, Sequence[str]],
    read: Rows,
    encoder: Encoder,
    progress: Progress,
) -> dict[str, Curve]:
    """The curves of all tensors, by name; `legal` has the types of each."""
    progress.start("error curves", len(tensors), "tensors")
    found = {}
    for tensor in tensors:
        found[tensor.name] = curve(tensor, legal[tensor.name], read, encoder)
        progress.advance(1)
    progress.finish()
    return found


def nbytes(tensor: FileTensor, kind: str, alignment: int = 32) -> int:
    """Bytes of a tensor of this type in a file, up to where the next one begins."""
    size = tensor.rows * len(tensor.parts) * ggml.row_bytes(kind, tensor.columns)
    return -(-size // alignment) * alignment


def _sample(tensor: FileTensor, part: int, read: Rows) -> tuple[NDArray[np.float32], float]:
    """Rows of a matrix, spread evenly over it, and how many rows of it each of them stands for."""
    budget = max(_RUN, SAMPLED_WEIGHTS // len(tensor.parts[:_MATRICES]) // tensor.columns)
    chosen = tensor.parts[part]
    count = chosen.stop - chosen.start
    if count <= budget:
        return read(chosen, 0, count), 1.0
    runs = max(1, budget // _RUN)
    starts = np.linspace(0, count - _RUN, runs).astype(int)
    rows = np.concatenate([read(chosen, int(start), int(start) + _RUN) for start in starts])
    return rows, count / len(rows)


def _unseen(tensor: FileTensor, encoder: Encoder) -> list[str]:
    """What calibration never reached: experts that no token was sent to, channels that are always zero."""
    found = []
    squares = encoder.statistics.squares.get(tensor.name)
    if squares is None:
        return []
    means = squares.reshape(len(tensor.parts), tensor.columns)
    for number, row in enumerate(means):
        of = f" of matrix {number}" if len(means) > 1 else ""
        if dead := int((row == 0).sum()):
            found.append(f"{tensor.name}: {dead} of {tensor.columns} channels{of} are zero on the calibration text")
    return found
