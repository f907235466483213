"""A checkpoint as its headers describe it; weights are read by position when they are asked for, never mapped.

Reading by `pread` keeps resident memory at the size of what was asked for, turns a file cut short while we read into
an error (a mapping would die of SIGBUS), and lets every read check that the file is still the one that was opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import strict_json
from efficli.checkpoint.files import Stamp, changed, contained, open_regular, read_exactly
from efficli.checkpoint.fingerprint import fingerprint_of, hash_tensor
from efficli.checkpoint.header import TensorRef
from efficli.checkpoint.sidecar import Sidecar, packed_blocks
from efficli.errors import UnsupportedError
from efficli.progress import Progress, Silent

NUMPY: Mapping[str, str] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip
"""numpy's type for each dtype; BF16 as its 16 bits."""

FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A Hugging Face directory: configuration, tensors' places, sidecar. Open one with `open_checkpoint`."""

    root: Path
    name: str
    """What to call it: hub id, the directory's name, or "reference"."""
    model: str
    """The user's word for it."""
    revision: str | None
    """The commit, for a checkpoint of the hub."""
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorRef]
    sidecar: Sidecar | None
    notes: tuple[str, ...] = ()
    """What a user should be told about how it was opened."""
    _stamps: dict[Path, Stamp] = field(default_factory=dict, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def file(self, name: str) -> Path | None:
        """The real path of a file of the checkpoint (`tokenizer.json`, `1_Pooling/config.json`), or None without one.

        A name or a link that leaves the directory is a SecurityError; what is not a regular file a CheckpointError.
        """
        path = contained(self.root, name)
        if not path.exists():
            return None
        with open_regular(path, name) as (_, stamp):
            if self._stamps.setdefault(path, stamp) != stamp:
                raise changed(name)
        return path

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file of the checkpoint, parsed strictly, or None without such a file."""
        path = self.file(name)
        return None if path is None else strict_json.load(path, name)

    def read_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) of the first axis of a tensor, as stored: BF16 as uint16 bits, the others as numpy's type.

        A scalar has one row. Safe to call from several threads; only these rows are held.
        """
        tensor = self.tensors[name]
        rows = tensor.shape[0] if tensor.shape else 1
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"rows [{start}, {stop}) of {name}, which has {rows}")
        if tensor.dtype not in NUMPY:
            raise UnsupportedError(f"dtype {tensor.dtype} cannot be read", where=name)
        out: NDArray[Any] = np.empty((stop - start, *tensor.shape[1:]), NUMPY[tensor.dtype])
        row_bytes = tensor.nbytes // rows
        self._read_into(tensor, start * row_bytes, out.reshape(-1).view(np.uint8).data)
        return out if tensor.shape else out.reshape(())

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the stored bytes of a tensor from byte `offset` on; safe to call from several threads."""
        self._read_into(self.tensors[name], offset, buffer)

    def read(self, name: str) -> NDArray[np.float32]:
        """A whole floating-point tensor as float32 (F64 is rounded)."""
        tensor = self.tensors[name]
        if tensor.dtype not in FLOATS:
            raise UnsupportedError(f"dtype {tensor.dtype}, expected F32, BF16, F16 or F64", where=name)
        stored = self.read_rows(name, 0, tensor.shape[0] if tensor.shape else 1)
        return to_float32(stored, tensor.dtype)

    def packed_blocks(self, name: str) -> bytes | None:
        """The exact codes that a pass chose for a tensor, verified against the sidecar; None where it chose none."""
        if self.sidecar is None or name not in self.sidecar.packed:
            return None
        return packed_blocks(self.root, self.sidecar, name)

    def check_unchanged(self) -> None:
        """Error if a file that was opened or asked for has another size, time or inode than it had then."""
        for path, stamp in list(self._stamps.items()):
            try:
                now = Stamp.of(path.stat())
            except OSError:
                now = None
            if now != stamp:
                raise changed(path.name)

    def hash(self, name: str, progress: Progress | None = None) -> str:
        """SHA-256 of a tensor's bytes, in hexadecimal; they are read for it."""
        tensor = self.tensors[name]
        return hash_tensor(tensor, self._stamps.get(tensor.file), progress)

    def fingerprint(self, progress: Progress | None = None) -> str:
        """`sha256:...` over configuration and tensors (`fingerprint.py`); reads every weight once, in slabs."""
        progress = progress or Silent()
        progress.start(f"hashing {self.name}", self.nbytes, "B")
        hashes = {name: (t.dtype, t.shape, self.hash(name, progress)) for name, t in self.tensors.items()}
        progress.finish()
        return fingerprint_of(self.config, hashes)

    def _read_into(self, tensor: TensorRef, offset: int, buffer: memoryview) -> None:
        with open_regular(tensor.file, tensor.file.name) as (descriptor, stamp):
            known = self._stamps.get(tensor.file, stamp)
            if stamp != known or read_exactly(descriptor, buffer, tensor.offset + offset) < len(buffer):
                raise changed(tensor.file.name)


def to_float32(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """What `read_rows` returned, as float32; exact but for F64."""
    if dtype != "BF16":
        return np.asarray(stored, np.float32)
    bits: NDArray[np.uint32] = stored.astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)
