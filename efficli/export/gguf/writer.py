"""Write GGUF files from a checkpoint: one streaming read feeds them all, and all that passes is hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint
from efficli.errors import OutputError
from efficli.export.gguf.header import Layout, StoredTensor, lay_out
from efficli.export.gguf.layout import Metadata, OutTensor, u32
from efficli.export.gguf.stream import Job, num_rows
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

    Without `hashes` (for files that nobody keeps) every sha256 is empty.
    CheckpointError: NaN or Inf, values that float16 cannot hold, input that changed meanwhile. UnsupportedError:
    weights that are not ternary, for a type that needs it. OutputError: a file cannot be written. Files stay partial.
    """
    progress = progress or Silent()
    for kind in {kind for _, _, choice in files for kind in choice.types.values()}:
        ggml.prepare(kind)
    outputs = [OutputFile.create(*file, tensors) for file in files]
    job = Job(ckpt, tensors, outputs, progress, hashes)
    progress.start("writing", sum(t.num_elements for t in tensors), "weights")
    try:
        job.run(threads or len(os.sched_getaffinity(0)))
        written = [file.finish() for file in outputs]
    finally:
        for file in outputs:
            os.close(file.descriptor)
        progress.finish()
    ckpt.check_unchanged()
    sources = {name: digest.hexdigest() if hashes else "" for name, digest in job.source_hashes.items()}
    return [
        WrittenFile(f.path, f.layout.nbytes, sha256 if hashes else "", f.written(hashes), sources)
        for f, sha256 in zip(outputs, written, strict=True)
    ]


def file_fields(choice: TypeChoice) -> Metadata:
    """The metadata that differs between files of one model."""
    return {"general.file_type": u32(choice.file_type), "general.quantization_version": u32(2)}


class OutputFile:
    """An output file while it is written."""

    def __init__(self, path: Path, layout: Layout, stored: Sequence[StoredTensor], choice: TypeChoice) -> None:
        self.path, self.layout, self.choice = path, layout, choice
        self.offsets: Mapping[str, int] = {
            tensor.name: offset for tensor, offset in zip(stored, layout.offsets, strict=True)
        }
        self.sha256 = hashlib.sha256(layout.head)
        self.hashed = len(layout.head)
        self.tensor_sha256 = {tensor.name: hashlib.sha256() for tensor in stored}
        self.sizes = {tensor.name: tensor.nbytes for tensor in stored}
        with _writing(path):
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self.write(layout.head, 0)

    @classmethod
    def create(cls, path: Path, metadata: Metadata, choice: TypeChoice, tensors: Sequence[OutTensor]) -> OutputFile:
        """Open the file and write its header."""
        stored = [
            StoredTensor(t.name, t.shape, ggml.type_id(kind), num_rows(t) * ggml.row_bytes(kind, t.shape[-1]))
            for t in tensors
            for kind in (choice.types[t.name],)
        ]
        return cls(path, lay_out({**metadata, **file_fields(choice)}, stored), stored, choice)

    def write(self, data: bytes | NDArray[np.uint8], offset: int) -> None:
        """Write all of `data` at `offset`."""
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        with _writing(self.path):
            while view:
                sent = os.pwrite(self.descriptor, view, offset)
                view, offset = view[sent:], offset + sent

    def hash(self, tensor: str, data: NDArray[np.uint8], offset: int) -> None:
        """Add a slab to the hashes of the file and of the tensor; slabs come in the order of the file."""
        self.sha256.update(bytes(offset - self.hashed))
        self.sha256.update(data.data)
        self.tensor_sha256[tensor].update(data.data)
        self.hashed = offset + data.nbytes

    def finish(self) -> str:
        """Bring the file to its full length; its sha256."""
        with _writing(self.path):
            os.ftruncate(self.descriptor, self.layout.nbytes)
        self.sha256.update(bytes(self.layout.nbytes - self.hashed))
        return self.sha256.hexdigest()

    def written(self, hashes: bool) -> dict[str, WrittenTensor]:
        """What the file holds."""
        return {
            name: WrittenTensor(self.choice.types[name], self.sizes[name], digest.hexdigest() if hashes else "")
            for name, digest in self.tensor_sha256.items()
        }


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the system's errors into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error
