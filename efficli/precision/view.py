"""What a checkpoint will be as a file: the tensors whose types can be chosen, and what a choice of types weighs.

Methods are handed a `FileView` by the pipeline, which knows the format; they know nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows of a checkpoint's matrix that are one matrix of the file: rows [start, stop) of matrix `index` of `name`."""

    name: str
    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor:
    """A tensor of the file whose type can be chosen: `matrices` matrices (rows, columns), one after the other."""

    name: str
    rows: int
    columns: int
    parts: tuple[Part, ...]
    """One for each matrix, in their order; () where the checkpoint has no such matrix."""
    group: str
    """What it does, as in `families.weights`: attn_q, ffn_down, embedding, ..."""
    layer: int | None
    packable: bool
    """Whether exact codes for its sources can be kept beside the weights, and copied into the file."""

    @property
    def num_weights(self) -> int:
        """Of all matrices."""
        return self.rows * self.columns * len(self.parts)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "rows": self.rows,
            "columns": self.columns,
            "parts": [[p.name, p.index, p.start, p.stop] for p in self.parts],
            "group": self.group,
            "layer": self.layer,
            "packable": self.packable,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FileTensor:
        """From what `to_json` gave."""
        parts = tuple(Part(name=n, index=i, start=a, stop=b) for n, i, a, b in data["parts"])
        return cls(**{**data, "parts": parts})


class FileView(Protocol):
    """A checkpoint as the file that it becomes."""

    @property
    def tensors(self) -> Sequence[FileTensor]:
        """Those whose types can be chosen; the others keep F32."""

    @property
    def multiplied(self) -> frozenset[str]:
        """Names of those that something is multiplied with: of the others the rows are looked up."""

    @property
    def num_weights(self) -> int:
        """Of the whole file."""

    @property
    def native(self) -> str:
        """The type that holds the checkpoint's own values: F32, F16 or BF16."""

    def nbytes(self, types: Mapping[str, str]) -> int:
        """Bytes of the whole file with these types: metadata, vocabulary, table, data, alignment."""

    def data_nbytes(self, types: Mapping[str, str]) -> int:
        """Bytes of its tensors alone."""

    def presets(self, names: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
        """What llama.cpp's file types of these names choose for `tensors`; those that it refuses are left out."""

    def most_bytes(self, target: str, ctx: int | None, types: Mapping[str, str]) -> int:
        """Bytes that a file of about these types, with the copies of its weights that the runtime makes, may take on
        `target` beside cache, scratch and system.

        FitError: none at all. UsageError: no such target.
        """

    def copies(self, target: str, kinds: Sequence[str]) -> Mapping[str, Mapping[str, int]]:
        """Bytes that the runtime of a target copies of each tensor of each of these types, where it copies any.

        It has them twice in memory, in the file and repacked.
        """

    def lacking(self, target: str) -> frozenset[str]:
        """Types that the runtime of a target cannot load."""

    def slow(self, target: str) -> frozenset[str]:
        """Types that a target computes more slowly than it reads them."""

    def read_imatrix(self, path: Path) -> Mapping[str, NDArray[np.float32]]:
        """mean(x²) by tensor of the file; UsageError if it is of another model (names or widths differ)."""

    def write_imatrix(
        self, path: Path, sums: Mapping[str, tuple[NDArray[np.float64], NDArray[np.int64]]], *, chunks: int, chunk: int
    ) -> None:
        """Write sums of x² (matrices, columns) and counts (matrices,), by tensor of the file, as llama-imatrix does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Tokens that a method looks at the model with, in chunks that each begin as the model's texts do."""

    name: str
    """What the texts are called."""
    sha256: str
    """Of the token ids and of how they are cut."""
    chunks: tuple[tuple[int, ...], ...]
    """To compute statistics on."""
    selection: tuple[tuple[int, ...], ...]
    """To choose between candidates on: none of `chunks`, unless there is only one."""
