"""Stream a checkpoint's tensors through the encoder into files, with every core.

Threads take slabs (runs of rows) in order. A slab is read, checked and encoded by the thread that took it; only hashing
and appending wait for their turn. Memory is a few slabs per thread, whatever the model's size, and the bytes do not
depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint
from efficli.errors import FitError
from efficli.export.gguf.encode import Scratch, Target, UnfitError, encode_slab, explain, target_of
from efficli.export.gguf.layout import OutTensor
from efficli.export.gguf.output import Full
from efficli.export.gguf.packed import PackedBlocks
from efficli.export.gguf.source import rows as source_rows
from efficli.export.gguf.types import TypeChoice
from efficli.progress import Progress

SLAB_WEIGHTS = 1 << 20
"""Weights that a thread takes at a time."""

_DIRECT = MappingProxyType({"BF16": np.uint16, "F16": np.float16, "F32": np.float32})


class Sink(Protocol):
    """An output file, as the threads see it."""

    choice: TypeChoice

    def append(self, tensor: str, data: NDArray[np.uint8], first: bool) -> list[Full]:
        """Take bytes, in the order of the file, `first` of their tensor or not; what is now to be flushed."""

    def flush(self, full: list[Full]) -> None:
        """Write that; from any thread."""


class _AbortedError(Exception):
    """Another slab failed, before this one in order."""


class _Turns:
    """Lets slabs through in order."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.next = 0

    def take(self, index: int, failed_at: Callable[[], float], action: Callable[[], None]) -> None:
        """Wait until every slab before `index` went through, then act; _AbortedError if one of them failed."""
        with self.condition:
            self.condition.wait_for(lambda: self.next == index or failed_at() < index)
            if self.next != index:
                raise _AbortedError
        action()
        self.pass_on()

    def pass_on(self) -> None:
        """Let the next one through."""
        with self.condition:
            self.next += 1
            self.condition.notify_all()


@dataclass(frozen=True, slots=True)
class _Slab:
    """Rows [start, stop) of a tensor, all leading axes counted as rows; `part` of `parts` of the tensor."""

    index: int
    tensor: OutTensor
    start: int
    stop: int
    part: int
    parts: int


@dataclass(slots=True)
class Job:
    """Everything that the threads share."""

    ckpt: Checkpoint
    tensors: Sequence[OutTensor]
    files: Sequence[Sink]
    progress: Progress
    hashes: bool = True
    source_hashes: dict[str, Any] = field(default_factory=dict)
    """hashlib objects by name of the tensor in the checkpoint."""
    failure: tuple[float, BaseException | None] = (float("inf"), None)
    """The first slab in order that failed."""
    _owners: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _reading: _Turns = field(default_factory=_Turns)
    _writing: _Turns = field(default_factory=_Turns)
    _packed: PackedBlocks = field(init=False)

    def __post_init__(self) -> None:
        self._packed = PackedBlocks(self.ckpt)

    def run(self, threads: int) -> None:
        """Work until all is written; raises what the first failing slab raised."""
        for tensor in self.tensors:
            for name in tensor.sources:
                if name not in self._owners:
                    self._owners[name] = tensor.name
                    self.source_hashes[name] = hashlib.sha256()
        slabs = iter(list(_plan(self.tensors)))
        workers = [threading.Thread(target=self._work, args=(slabs,), name=f"encode-{n}") for n in range(threads)]
        started = []
        try:
            for worker in workers:
                try:
                    worker.start()
                except RuntimeError:
                    # no memory for one more stack
                    break
                started.append(worker)
            if not started:
                self._work(slabs)
            for worker in started:
                worker.join()
        except BaseException:
            self._fail(-1, None)
            for worker in started:
                worker.join()
            raise
        if self.failure[1] is not None:
            raise self.failure[1]

    def _work(self, slabs: Iterator[_Slab]) -> None:
        """One thread: slab after slab."""
        scratch = Scratch()
        while True:
            with self._lock:
                slab = next(slabs, None)
            if slab is None or self.failure[0] < slab.index:
                return
            try:
                self._do(slab, scratch)
            except _AbortedError:
                return
            except MemoryError:
                self._fail(slab.index, FitError(f"out of memory while writing {slab.tensor.name}"))
                return
            except BaseException as error:  # noqa: BLE001 (raised again by the thread that started us)
                self._fail(slab.index, error)
                return

    def _fail(self, index: float, error: BaseException | None) -> None:
        with self._lock:
            if index < self.failure[0]:
                self.failure = (index, error)
        for turns in (self._reading, self._writing):
            with turns.condition:
                turns.condition.notify_all()

    def _heed(self, slab: _Slab) -> None:
        """Stop where an earlier slab failed, or the user interrupted."""
        if self.failure[0] < slab.index:
            raise _AbortedError

    def _failed_at(self) -> float:
        return self.failure[0]

    def _do(self, slab: _Slab, scratch: Scratch) -> None:
        """Read, hash, check, encode, write one slab."""
        raw = self._read(slab, scratch)
        if self.hashes:
            pieces = self._source_bytes(slab, raw, scratch)
            self._reading.take(slab.index, self._failed_at, lambda: self._hash_sources(pieces))
        encoded = self._encode(slab, raw, scratch)
        full: list[list[Full]] = []
        self._writing.take(slab.index, self._failed_at, lambda: full.extend(self._append(slab, encoded)))
        for file, parts in zip(self.files, full, strict=True):
            file.flush(parts)
        self._report(slab)

    def _encode(self, slab: _Slab, raw: NDArray[Any], scratch: Scratch) -> list[NDArray[np.uint8]]:
        """The slab's bytes for each file: packed blocks where they have the wanted type, encoded otherwise."""
        tensor, kind = slab.tensor, self._packed.type_of(slab.tensor)
        copied = [file.choice.types[tensor.name] == kind for file in self.files]
        targets, uses = self._targets(slab, copied)
        try:
            encoded = encode_slab(tensor, raw, targets, scratch, lambda: self._heed(slab))
        except UnfitError:
            raise explain(self.ckpt, tensor.sources) from None
        if any(copied):
            blocks = self._packed.rows(tensor, slab.start, slab.stop)
        return [blocks if copy else encoded[use] for copy, use in zip(copied, uses, strict=True)]

    def _hash_sources(self, pieces: list[tuple[str, memoryview]]) -> None:
        for name, data in pieces:
            self.source_hashes[name].update(data)

    def _append(self, slab: _Slab, encoded: list[NDArray[np.uint8]]) -> list[list[Full]]:
        """Hand the bytes to each file; this must be quick, others wait for their turn."""
        return [
            file.append(slab.tensor.name, data, slab.part == 0) for file, data in zip(self.files, encoded, strict=True)
        ]

    def _report(self, slab: _Slab) -> None:
        with self._lock:
            self.progress.advance((slab.stop - slab.start) * slab.tensor.shape[-1])

    def _targets(self, slab: _Slab, copied: list[bool]) -> tuple[list[Target], list[int]]:
        """The distinct encodings that the files want of this slab, and which of them each file takes (-1: none)."""
        targets: list[Target] = []
        seen: dict[tuple[str, int, bool], int] = {}
        uses = []
        for file, copy in zip(self.files, copied, strict=True):
            if copy:
                uses.append(-1)
                continue
            choice, name = file.choice, slab.tensor.name
            weights = None if choice.imatrix is None else choice.imatrix.get(name)
            kind = choice.types[name]
            key = (kind, id(weights), choice.allow_non_ternary)
            if key not in seen:
                seen[key] = len(targets)
                targets.append(target_of(kind, _expert(weights, slab), choice.allow_non_ternary))
            uses.append(seen[key])
        return targets, uses

    def _read(self, slab: _Slab, scratch: Scratch) -> NDArray[Any]:
        """The slab's rows (r, c) as they are in the checkpoint, transformed where the format wants that."""
        tensor, columns = slab.tensor, slab.tensor.shape[-1]
        if not self._is_direct(tensor):
            return source_rows(self.ckpt, tensor, slab.start, slab.stop).reshape(-1, columns)
        ref = self.ckpt.tensors[tensor.sources[0]]
        dtype: np.dtype[Any] = np.dtype(_DIRECT[ref.dtype])
        row = columns * dtype.itemsize
        buffer = scratch.bytes("raw", (slab.stop - slab.start) * row)
        self.ckpt.read_into(ref.name, slab.start * row, buffer.data)
        return buffer.view(dtype).reshape(-1, columns)

    def _is_direct(self, tensor: OutTensor) -> bool:
        """Whether the tensor's rows are exactly those of its one source."""
        if tensor.transform != "copy" or len(tensor.sources) != 1:
            return False
        ref = self.ckpt.tensors[tensor.sources[0]]
        return ref.shape == tensor.shape and ref.dtype in _DIRECT

    def _source_bytes(self, slab: _Slab, raw: NDArray[Any], scratch: Scratch) -> list[tuple[str, memoryview]]:
        """What to hash with this slab: the bytes of its tensor's sources, in order, are spread over its parts."""
        tensor = slab.tensor
        owned = [name for name in dict.fromkeys(tensor.sources) if self._owners[name] == tensor.name]
        if owned and self._is_direct(tensor):
            return [(owned[0], raw.reshape(-1).view(np.uint8).data)]
        refs = [self.ckpt.tensors[name] for name in owned]
        total = sum(ref.nbytes for ref in refs)
        start, stop = (total * part // slab.parts for part in (slab.part, slab.part + 1))
        buffer = scratch.bytes("source", stop - start)
        pieces = []
        begin = filled = 0
        for name, ref in zip(owned, refs, strict=True):
            first, last = max(start, begin), min(stop, begin + ref.nbytes)
            if first < last:
                piece = buffer[filled : filled + last - first].data
                self.ckpt.read_into(name, first - begin, piece)
                pieces.append((name, piece))
                filled += last - first
            begin += ref.nbytes
        return pieces


def num_rows(tensor: OutTensor) -> int:
    """Rows of a tensor, all leading axes together."""
    return tensor.num_elements // tensor.shape[-1]


def _plan(tensors: Sequence[OutTensor]) -> Iterator[_Slab]:
    """Cut the tensors into slabs of whole rows; whole heads where rows are permuted, never across experts."""
    index = 0
    for tensor in tensors:
        rows, columns = num_rows(tensor), tensor.shape[-1]
        unit = tensor.shape[0] // tensor.heads if tensor.transform == "permute" and tensor.heads else 1
        step = max(1, SLAB_WEIGHTS // (columns * unit)) * unit
        group = tensor.shape[-2] if len(tensor.shape) > 2 else rows
        cuts = [
            (first + n, first + min(n + step, group)) for first in range(0, rows, group) for n in range(0, group, step)
        ]
        for part, (start, stop) in enumerate(cuts):
            yield _Slab(index, tensor, start, stop, part, len(cuts))
            index += 1


def _expert(weights: NDArray[np.float32] | None, slab: _Slab) -> NDArray[np.float32] | None:
    """The importance of the columns of the slab's expert; of all columns where there are no experts."""
    columns = slab.tensor.shape[-1]
    if weights is None or weights.size == columns:
        return weights
    number = slab.start // slab.tensor.shape[-2]
    expert = weights.reshape(-1)[number * columns : (number + 1) * columns]
    return expert if expert.size == columns else None
