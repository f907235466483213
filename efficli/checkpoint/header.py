"""Read the header of a safetensors file: every claim is checked against the file's size before anything is allocated.

Layout: u64 little-endian n · n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end)}} · data. The safetensors
library accepts duplicate names, empty tensors and names such as `../../x`; this reader does not.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficli.checkpoint.files import Stamp, changed, open_regular, read_exactly
from efficli.checkpoint.strict_json import Fault, parse
from efficli.errors import CheckpointError, SecurityError, UnsupportedError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_DAMAGED = "the file is damaged or was not fetched whole: fetch or save it again"
_HOSTILE = "no program writes this by itself: take the checkpoint from a source that you trust"

_LFS_POINTER = b"version "
"""How the small file begins that stands for a large one in a clone without Git LFS."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype of the format."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a tensor's bytes are: `nbytes` of `dtype` (safetensors' name) at absolute `offset` of `file`, row-major."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: its tensors in file order, its metadata, and the stamp of the file as it was read."""

    tensors: tuple[TensorRef, ...]
    metadata: dict[str, str]
    stamp: Stamp


def read_header(path: Path, where: str | None = None) -> Header:
    """The checked header of the safetensors file `path`; errors name `where` (default: the file's name)."""
    where = where or path.name
    with open_regular(path, where) as (descriptor, stamp):
        try:
            text = _read_text(descriptor, stamp.size, where)
            entries = _parse(text, where)
            metadata = _metadata(entries.pop("__metadata__", {}), where)
            base = 8 + len(text)
            tensors = [_tensor(path, base, name, entry, where) for name, entry in entries.items()]
            tensors.sort(key=lambda t: t.offset)
            _check_cover(tensors, base, stamp.size, where)
        except CheckpointError as error:
            error.hint = error.hint or _DAMAGED
            raise
    return Header(tuple(tensors), metadata, stamp)


def is_lfs_pointer(path: Path, where: str | None = None) -> bool:
    """Whether `path` is what a clone without Git LFS has in the place of a large file."""
    with open_regular(path, where or path.name) as (descriptor, _):
        start = bytearray(8)
        return read_exactly(descriptor, memoryview(start), 0) == 8 and start == _LFS_POINTER


def _read_text(descriptor: int, size: int, where: str) -> bytearray:
    """The header's bytes in a file of `size` bytes."""
    start = bytearray(8)
    if read_exactly(descriptor, memoryview(start), 0) < 8:
        raise CheckpointError(f"header too small (the file has {size} bytes)", where=where)
    if start == _LFS_POINTER:
        hint = "git lfs install, then git lfs pull in the folder"
        raise CheckpointError("is a Git LFS pointer, the weights were not fetched", where=where, hint=hint)
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"header too large ({length} bytes, at most {MAX_HEADER_BYTES})", where=where)
    if length < 2:
        raise CheckpointError(f"header too small ({length} bytes)", where=where)
    if length > size - 8:
        raise CheckpointError(f"{length + 8 - size} bytes short of what its header says", where=where)
    text = bytearray(length)
    if read_exactly(descriptor, memoryview(text), 8) < length:
        raise changed(where)
    return text


def _parse(data: bytearray, where: str) -> dict[str, Any]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"header is not UTF-8 (byte {8 + error.start})", where=where) from None
    if not text.startswith("{"):
        raise CheckpointError("header does not begin with '{': not a safetensors file", where=where)
    value = parse(text)
    if isinstance(value, Fault):
        inner = ("dtype", "shape", "data_offsets")
        if value.key is not None and value.key not in inner:
            raise CheckpointError(f"duplicate tensor {value.key!r}", where=where)
        raise CheckpointError(f"header: {value.message}", where=where)
    assert isinstance(value, dict)
    return value


def _metadata(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError("header: __metadata__ holds something other than strings", where=where)
    return value


def _tensor(path: Path, base: int, name: str, entry: Any, where: str) -> TensorRef:
    """One checked entry of the header."""
    _check_name(name, where)
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"tensor {name!r} lacks dtype, shape or data_offsets", where=where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise UnsupportedError(f"tensor {name!r} has the unknown dtype {repr(dtype)[:40]}", where=where)
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"tensor {name!r} has an invalid shape", where=where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise CheckpointError(f"invalid offset for tensor {name!r}", where=where)
    begin, end = offsets
    if not 0 <= begin <= end < 1 << 63:
        raise CheckpointError(f"invalid offset for tensor {name!r}: [{begin}, {end})", where=where)
    count = 1
    for n in shape:
        count *= n
        if count >= 1 << 63:
            raise CheckpointError(f"tensor {name!r}: shape overflows", where=where)
    needed = (count * bits + 7) // 8
    if needed != end - begin:
        raise CheckpointError(f"tensor {name!r}: shape needs {needed} bytes, has {end - begin}", where=where)
    if count == 0:
        raise CheckpointError(f"tensor {name!r} is empty", where=where)
    return TensorRef(name, tuple(shape), dtype, path, base + begin, needed)


def _check_name(name: str, where: str) -> None:
    """Names become paths and lines of text elsewhere: what could do harm there is refused here."""
    if name.isprintable() and "/" not in name and "\\" not in name and name not in ("", ".", ".."):
        return
    wrong = next((c for c in name if c in "/\\" or not c.isprintable()), None)
    what = f"contains {wrong!r}" if wrong else "is empty or a path"
    raise SecurityError(f"tensor name {what}: {name[:80]!r}", where=where, hint=_HOSTILE)


def _check_cover(tensors: list[TensorRef], base: int, size: int, where: str) -> None:
    """The tensors, in order of offset, cover the data without hole, overlap or rest."""
    position = base
    for tensor in tensors:
        if tensor.offset != position:
            relation = "overlaps the one before it" if tensor.offset < position else "leaves a hole before it"
            raise CheckpointError(f"invalid offset for tensor {tensor.name!r}: {relation}", where=where)
        position += tensor.nbytes
    if position > size:
        raise CheckpointError(f"{position - size} bytes short of what its header says", where=where)
    if position < size:
        raise SecurityError(f"{size - position} bytes not covered by any tensor", where=where, hint=_HOSTILE)
