"""Read the header of a GGUF file (version 2 or 3, little-endian), strictly: no count or length is believed unchecked.

Source: ggml's docs/gguf.md. The gguf package's reader loops for ever on some damaged files, and refuses Q2_0.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from efficli.errors import CheckpointError
from efficli.ops import ggml

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SMALLEST_FIELD, _SMALLEST_TENSOR = 13, 24  # bytes: empty name, type, one byte; empty name, axes, type, offset
_MAX_AXES = 4


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """Where a tensor lies: `shape` in numpy order, absolute `offset`."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Metadata as plain Python values, and the tensors' places."""

    metadata: dict[str, Any]
    tensors: dict[str, PlacedTensor]


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file; CheckpointError for what is none, is damaged, or ends before its tensors do."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise _error(path, "not a GGUF v2/v3 file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(path, data, size).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None


def _error(path: Path, message: str, *, is_cut: bool = False) -> CheckpointError:
    return CheckpointError(message, where=path.name, hint="copy or make the whole file again" if is_cut else None)


class _Cursor:
    """A place in the file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0

    def header(self) -> GgufHeader:
        magic, version, tensors, fields = self.take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise _error(self.path, "not a GGUF v2/v3 file")
        self.fits(fields, _SMALLEST_FIELD, "metadata fields")
        self.fits(tensors, _SMALLEST_TENSOR, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self.string()
            if key in metadata:
                raise _error(self.path, f"duplicate key '{key}'")
            metadata[key] = self.value(self.take("<I")[0], key)
        infos = [self.info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise _error(self.path, f"alignment is {alignment!r}, expected a power of two")
        start = -(-self.at // alignment) * alignment
        found: dict[str, PlacedTensor] = {}
        for name, shape, number, offset in infos:
            if name in found:
                raise _error(self.path, f"duplicate tensor '{name}'")
            found[name] = self.place(name, shape, number, start + offset)
        return GgufHeader(metadata, found)

    def place(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> PlacedTensor:
        try:
            kind = ggml.type_name(number)
            nbytes = prod(shape[:-1]) * ggml.row_bytes(kind, shape[-1])
        except (KeyError, ValueError):
            raise _error(self.path, f"tensor '{name}' has an unknown type ({number}) or shape {shape}") from None
        past = offset + nbytes - self.size
        if past > 0:
            raise _error(self.path, f"tensor '{name}' ends {past} byte{'s' * (past > 1)} past the file", is_cut=True)
        return PlacedTensor(kind, shape, offset, nbytes)

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (axes,) = self.take("<I")
        if not 1 <= axes <= _MAX_AXES:
            raise _error(self.path, f"tensor '{name}' has {axes} axes")
        shape = self.take(f"<{axes}Q")[::-1]
        number, offset = self.take("<IQ")
        return name, shape, number, offset

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.take("<" + _SCALARS[kind])[0]
        if kind != _ARRAY:
            raise _error(self.path, f"'{key}' has the unknown type {kind}")
        item, count = self.take("<IQ")
        if item == _STRING:
            self.fits(count, 8, f"strings of '{key}'")
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise _error(self.path, f"'{key}' is an array of the type {item}")
        self.fits(count, struct.calcsize("<" + _SCALARS[item]), f"items of '{key}'")
        return list(self.take(f"<{count}{_SCALARS[item]}"))

    def string(self) -> str:
        (count,) = self.take("<Q")
        self.fits(count, 1, "bytes of a string")
        return str(self.take(f"{count}s")[0], "utf-8", "replace")

    def fits(self, count: int, nbytes: int, what: str) -> None:
        if count * nbytes > self.size - self.at:
            raise _error(self.path, f"damaged: {count} {what} in {self.size - self.at} bytes")

    def take(self, form: str) -> tuple[Any, ...]:
        end = self.at + struct.calcsize(form)
        if end > self.size:
            raise _error(self.path, "damaged: it ends within its header", is_cut=True)
        values = struct.unpack_from(form, self.data, self.at)
        self.at = end
        return values
