"""Importance matrices: mean(x²) of every input column of every weight, as llama.cpp's quantizer uses them.

Read and written in the formats of llama-imatrix (GGUF, and its older .dat), or computed from a GGUF file and a text.
An importance matrix here is a dictionary: tensor name -> float32 (columns,), of experts one after the other.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from efficli.artifact.temporary import scratch_directory
from efficli.errors import CheckpointError
from efficli.export.gguf.header import StoredTensor, lay_out
from efficli.export.gguf.layout import array, string, u32
from efficli.export.gguf.parse import GgufHeader, read_gguf
from efficli.ops.child import run_child
from efficli.ops.storage import writing
from efficli.progress import Progress

Imatrix = dict[str, NDArray[np.float32]]

_SUM, _COUNT = ".in_sum2", ".counts"
_MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class Sums:
    """What is collected for a weight: `squares` (matrices, columns), sums of x², and how many x each matrix saw."""

    squares: NDArray[np.float32]
    counts: NDArray[np.int64]

    def mean(self) -> NDArray[np.float32]:
        """mean(x²), flat; an expert that saw nothing counts every column the same, as in llama.cpp."""
        seen = self.counts[:, None] > 0
        means = np.where(seen, self.squares / np.maximum(self.counts[:, None], 1).astype(np.float32), np.float32(1))
        return means.astype(np.float32).reshape(-1)


def read_imatrix(path: Path) -> Imatrix:
    """Read a file of llama-imatrix; CheckpointError for one that is damaged, empty, or holds NaN, Inf or negatives."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        hint = "llama-imatrix makes such a file; --imatrix auto computes one now"
        raise CheckpointError(f"cannot read {path}: {reason}", hint=hint) from None
    found = _means(path, read_gguf(path)) if magic == b"GGUF" else _legacy(path)
    if not found:
        raise CheckpointError("holds no importance matrix", where=path.name)
    for name, values in found.items():
        if not np.isfinite(values).all() or (values < 0).any():
            raise CheckpointError(f"values of '{name}' are negative or not finite", where=path.name)
    return found


def _means(path: Path, header: GgufHeader) -> Imatrix:
    """mean(x²) of every pair of sums and counts."""
    found = {}
    for name in (name.removesuffix(_SUM) for name in header.tensors if name.endswith(_SUM)):
        sums, counts = header.tensors[name + _SUM], header.tensors.get(name + _COUNT)
        if counts is None or {sums.type, counts.type} != {"F32"}:
            raise CheckpointError(f"sums of '{name}' have no counts, or are not F32", where=path.name)
        with path.open("rb") as file:
            file.seek(sums.offset)
            squares = np.fromfile(file, np.float32, sums.nbytes // 4)
            file.seek(counts.offset)
            seen = np.fromfile(file, np.float32, counts.nbytes // 4)
        if squares.size % seen.size or not np.isfinite(seen).all():
            raise CheckpointError(f"{seen.size} counts of {squares.size} sums of '{name}'", where=path.name)
        found[name] = Sums(squares.reshape(seen.size, -1), np.rint(seen).astype(np.int64)).mean()
    return found


def _legacy(path: Path) -> Imatrix:
    """The older format: a count of entries; of each the name, number of calls, and means times calls."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal at
        end = at + struct.calcsize(form)
        if end > len(data):
            raise CheckpointError("not an importance matrix: neither GGUF nor llama-imatrix's .dat", where=path.name)
        values: tuple[int, ...] = struct.unpack_from(form, data, at)
        at = end
        return values

    found: Imatrix = {}
    (entries,) = take("<i")
    for _ in range(entries):
        (length,) = take("<i")
        if not 0 < length < _MAX_NAME:
            raise CheckpointError("not an importance matrix: neither GGUF nor llama-imatrix's .dat", where=path.name)
        name = bytes(take(f"<{length}B")).decode(errors="replace")
        calls, count = take("<ii")
        start = at
        take(f"<{max(count, 1) * 4}x")
        values = np.frombuffer(data, np.float32, max(count, 1), start)
        found[name] = (values / np.float32(max(calls, 1))).astype(np.float32)
    return found


def write_imatrix(path: Path, sums: Mapping[str, Sums], *, dataset: str, chunk: int, chunks: int) -> None:
    """Write sums as llama-imatrix does: a file that llama-quantize reads."""
    fields = {
        "general.type": string("imatrix"),
        "imatrix.datasets": array([dataset], GGUFValueType.STRING),
        "imatrix.chunk_count": u32(chunks),
        "imatrix.chunk_size": u32(chunk),
    }
    parts: list[tuple[str, NDArray[np.float32]]] = []
    for name, entry in sorted(sums.items()):
        parts.append((name + _SUM, np.ascontiguousarray(entry.squares, np.float32)))
        parts.append((name + _COUNT, entry.counts.astype(np.float32)[:, None]))
    layout = lay_out(fields, [StoredTensor(name, values.shape, 0, values.nbytes) for name, values in parts])
    with writing(path), path.open("wb") as file:
        file.write(layout.head)
        for offset, (_, values) in zip(layout.offsets, parts, strict=True):
            file.seek(offset)
            file.write(values.data)
        file.truncate(layout.nbytes)


def compute_imatrix(
    path: Path,
    text: str | Sequence[int],
    *,
    chunk: int = 512,
    max_chunks: int | None = None,
    threads: int | None = None,
    exact: bool = False,
    progress: Progress | None = None,
) -> dict[str, Sums]:
    """Run a GGUF file over a text or its token ids, in a child process, and collect what every weight's input sees.

    The text is cut into chunks of `chunk` tokens, each begun with the model's BOS as llama-imatrix does; the rest that
    fills no chunk is left out. CheckpointError if it fills none. `exact` keeps the KV cache in float32, to compare with
    PyTorch; llama-imatrix does not.
    """
    with scratch_directory() as folder:
        out = folder / "sums.npz"
        argument = {
            "gguf": str(path.absolute()),
            "text": text if isinstance(text, str) else list(text),
            "chunk": chunk,
            "max_chunks": max_chunks,
            "threads": threads,
            "exact": exact,
            "out": str(out),
        }
        what = f"computing the importance matrix of {path.name}"
        run_child("efficli.ops.collect:collect", argument, what=what, progress=progress)
        with np.load(out) as stored:
            names = {name.removesuffix(_SUM) for name in stored.files if name.endswith(_SUM)}
            return {name: Sums(stored[name + _SUM], stored[name + _COUNT]) for name in sorted(names)}


def means(sums: Mapping[str, Sums]) -> Imatrix:
    """mean(x²) of every weight: what `TypeRequest.imatrix` takes."""
    return {name: entry.mean() for name, entry in sums.items()}
