"""Write GGUF files from a checkpoint: one streaming read feeds them all, and all that passes is hashed."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint
from efficli.export.gguf.header import lay_out
from efficli.export.gguf.layout import Metadata, OutTensor
from efficli.export.gguf.output import AppendedFile, Full
from efficli.export.gguf.stream import Job
from efficli.export.gguf.types import TypeChoice
from efficli.ops import ggml
from efficli.progress import Progress, Silent


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """One tensor of a written file."""

    type: str
    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A finished file (not yet synced to disk) and the hashes of what is in it and of what it was made from."""

    path: Path
    nbytes: int
    sha256: str
    tensors: Mapping[str, WrittenTensor]
    sources: Mapping[str, str]
    """sha256 of the bytes of every tensor of the checkpoint that was read."""


def write_files(
    ckpt: Checkpoint,
    tensors: Sequence[OutTensor],
    files: Sequence[tuple[Path, Metadata, TypeChoice]],
    *,
    threads: int | None = None,
    hashes: bool = True,
    progress: Progress | None = None,
) -> list[WrittenFile]:
    """Write each (path, metadata, types) from one read of the checkpoint; `general.file_type` is added.

    Without `hashes` (for files that nobody keeps) every sha256 is empty, and `sources` too.
    CheckpointError: NaN or Inf, values that float16 cannot hold, input that changed meanwhile. UnsupportedError:
    weights that are not ternary, for a type that needs it. OutputError: a file cannot be written. Files stay partial.
    """
    progress = progress or Silent()
    _prepare({kind for _, _, choice in files for kind in choice.types.values()})
    with ExitStack() as opened:
        outputs = []
        for path, metadata, choice in files:
            outputs.append(OutputFile(path, metadata, choice, tensors, hashes))
            opened.callback(outputs[-1].close)
        job = Job(ckpt, tensors, outputs, progress, hashes)
        progress.start("writing", sum(t.num_elements for t in tensors), "weights")
        opened.callback(progress.finish)
        job.run(threads or len(os.sched_getaffinity(0)))
        written = [file.finish() for file in outputs]
    ckpt.check_unchanged()
    sources = {name: digest.hexdigest() for name, digest in job.source_hashes.items()} if hashes else {}
    return [
        WrittenFile(file.path, file.layout.nbytes, sha256, file.written(), sources)
        for file, sha256 in zip(outputs, written, strict=True)
    ]


def _prepare(kinds: Iterable[str]) -> None:
    """Build the encoders' tables: 12 s for IQ1. In a thread, as a call of C holds off an interrupt until it returns."""

    def prepare() -> None:
        for kind in kinds:
            ggml.prepare(kind)

    worker = threading.Thread(target=prepare, daemon=True)
    worker.start()
    worker.join()


class OutputFile:
    """An output file while it is written, with its hashes."""

    def __init__(
        self, path: Path, metadata: Metadata, choice: TypeChoice, tensors: Sequence[OutTensor], hashes: bool
    ) -> None:
        stored = choice.stored(tensors)
        self.path, self.choice, self.hashes = path, choice, hashes
        self.layout = lay_out({**metadata, **choice.fields}, stored)
        self.offsets = dict(zip((t.name for t in stored), self.layout.offsets, strict=True))
        self.sizes = {tensor.name: tensor.nbytes for tensor in stored}
        self.sha256 = hashlib.sha256()
        self.tensor_sha256 = {tensor.name: hashlib.sha256() for tensor in stored}
        self.file = AppendedFile(path, self.layout.nbytes)
        self._append(memoryview(self.layout.head), self.file.flush)

    def append(self, tensor: str, data: NDArray[np.uint8], first: bool) -> list[Full]:
        """Add a slab's bytes, in the order of the file; what is to be flushed. `first`: of its tensor, so aligned."""
        full: list[Full] = []
        if first:
            padding = bytes(self.offsets[tensor] - self.file.position)
            self._append(memoryview(padding), full.extend)
        self._append(data.data, full.extend)
        if self.hashes:
            self.tensor_sha256[tensor].update(data.data)
        return full

    def _append(self, data: memoryview, take: Callable[[list[Full]], None]) -> None:
        if self.hashes:
            self.sha256.update(data)
        take(self.file.append(data))

    def flush(self, full: list[Full]) -> None:
        """Write what `append` returned."""
        self.file.flush(full)

    def finish(self) -> str:
        """Bring the file to its full length; its sha256, or nothing without hashes."""
        self._append(memoryview(bytes(self.layout.nbytes - self.file.position)), self.file.flush)
        self.file.finish()
        return self.sha256.hexdigest() if self.hashes else ""

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def written(self) -> dict[str, WrittenTensor]:
        """What the file holds."""
        return {
            name: WrittenTensor(self.choice.types[name], self.sizes[name], digest.hexdigest() if self.hashes else "")
            for name, digest in self.tensor_sha256.items()
        }
