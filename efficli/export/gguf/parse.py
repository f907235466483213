"""Read the header of a GGUF file (version 2 or 3, little-endian), strictly: no count or length is believed unchecked.

Source: ggml's docs/gguf.md and gguf.cpp, whose rules for names and places are held here too. The gguf package's reader
loops for ever on some damaged files, and refuses Q2_0. Only the header is read, by position, into bounded memory.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from efficli.checkpoint.files import changed, open_regular, read_exactly
from efficli.errors import CheckpointError
from efficli.ops.ggml_types import BLOCKS, TYPE_IDS

MAX_HEADER_BYTES = 1 << 27
"""128 MiB; the largest vocabularies known take 20."""
MAX_TENSORS = 1 << 17
MAX_FIELDS = 1 << 16
MAX_ITEMS = 1 << 22
"""Items of all arrays together: 4 million; a vocabulary of 262 thousand tokens with its merges has 1.3."""

SCALARS: Mapping[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""Number of a metadata type -> struct's letter for it."""
STRING, ARRAY = 8, 9

_NAMES = {number: name for name, number in TYPE_IDS.items()}
_SMALLEST_FIELD, _SMALLEST_TENSOR = 13, 24  # bytes: empty name, type, one byte; empty name, axes, type, offset
_MAX_AXES = 4
_MAX_NAME = 64  # GGML_MAX_NAME, the zero at the end included
_FIRST_READ = 1 << 16
_SHOWN = 80
_LENGTH = struct.Struct("<Q")


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
    kinds: dict[str, tuple[int, int | None]]
    """The metadata's types as numbered in GGUF, and that of an array's items."""
    version: int
    data_start: int
    """Where the header ends and the tensors begin, in bytes."""
    nbytes: int
    """Size of the file."""
    alignment: int

    @property
    def data_end(self) -> int:
        """Where the last tensor ends, without padding."""
        return max((t.offset + t.nbytes for t in self.tensors.values()), default=self.data_start)


def read_gguf(path: Path) -> GgufHeader:
    """The header of a GGUF file; CheckpointError for what is none, is damaged, or ends before its tensors do."""
    with open_regular(path, shown(path.name)) as (descriptor, stamp):
        return _Cursor(path, descriptor, stamp.size).header()


def shown(text: str) -> str:
    """A name of the file as messages show it: printable, and not long."""
    text = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _error(path: Path, message: str, hint: str = "copy or make the whole file again") -> CheckpointError:
    return CheckpointError(message, where=shown(path.name), hint=hint)


class _Cursor:
    """A place in the header, which is read as it is needed."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.descriptor, self.size, self.at = path, descriptor, size, 0
        self.data = bytearray()
        self.items = 0

    def header(self) -> GgufHeader:
        version, tensors, fields = self.start()
        self.fits(fields, _SMALLEST_FIELD, "metadata fields", MAX_FIELDS)
        self.fits(tensors, _SMALLEST_TENSOR, "tensors", MAX_TENSORS)
        metadata: dict[str, Any] = {}
        kinds: dict[str, tuple[int, int | None]] = {}
        for _ in range(fields):
            key = self.string()
            if key in metadata:
                raise _error(self.path, f"duplicate key '{shown(key)}'")
            (kind,) = self.take("<I")
            metadata[key], kinds[key] = self.value(kind, shown(key))
        infos = [self.info() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _error(self.path, f"alignment is {shown(repr(alignment))}, expected a power of two")
        start = -(-self.at // alignment) * alignment
        found: dict[str, PlacedTensor] = {}
        expected = start
        for name, shape, number, offset in infos:
            if name in found:
                raise _error(self.path, f"duplicate tensor '{shown(name)}'")
            placed = found[name] = self.place(name, shape, number, start + offset)
            if placed.offset != expected:
                raise _error(self.path, f"tensor '{shown(name)}' is at byte {placed.offset}, expected {expected}")
            expected = -(-(placed.offset + placed.nbytes) // alignment) * alignment
        return GgufHeader(metadata, found, kinds, version, start, self.size, alignment)

    def start(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of metadata fields."""
        magic = b"" if self.size < 4 else self.take("<4s")[0]
        if magic != b"GGUF":
            raise _error(self.path, "not a GGUF v2/v3 file", "give a file that `efficli export` or llama.cpp wrote")
        if self.size < 24:
            raise _error(self.path, "not a GGUF v2/v3 file: it ends within its first 24 bytes")
        version, tensors, fields = self.take("<IQQ")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = f"version {version}" if swapped not in (2, 3) else "big-endian"
            hint = "convert the model again: llama.cpp reads versions 2 and 3, on this machine little-endian"
            raise _error(self.path, f"not a GGUF v2/v3 file ({what})", hint)
        return version, tensors, fields

    def place(self, name: str, shape: tuple[int, ...], number: int, offset: int) -> PlacedTensor:
        kind = _NAMES.get(number)
        if kind is None or not all(shape) or prod(shape) >= 1 << 63 or shape[-1] % BLOCKS[kind][0]:
            text = f"tensor '{shown(name)}' has an unknown type ({number}) or shape {shape}"
            raise _error(self.path, text)
        size, nbytes = BLOCKS[kind]
        nbytes *= prod(shape[:-1]) * (shape[-1] // size)
        past = offset + nbytes - self.size
        if past > 0:
            text = f"tensor '{shown(name)}' ends {past} byte{'s' * (past > 1)} past the file"
            raise _error(self.path, text)
        return PlacedTensor(kind, shape, offset, nbytes)

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        if len(name.encode("utf-8", "replace")) >= _MAX_NAME:
            raise _error(self.path, f"tensor '{shown(name)}' has a name of {len(name)} letters, at most 63 are allowed")
        (axes,) = self.take("<I")
        if not 1 <= axes <= _MAX_AXES:
            raise _error(self.path, f"tensor '{shown(name)}' has {axes} axes")
        shape = self.take(f"<{axes}Q")[::-1]
        number, offset = self.take("<IQ")
        return name, shape, number, offset

    def value(self, kind: int, key: str) -> tuple[Any, tuple[int, int | None]]:
        """A value, and its type."""
        if kind == STRING:
            return self.string(), (kind, None)
        if kind in SCALARS:
            return self.take("<" + SCALARS[kind])[0], (kind, None)
        if kind != ARRAY:
            raise _error(self.path, f"'{key}' has the unknown type {kind}")
        item, count = self.take("<IQ")
        if item != STRING and item not in SCALARS:
            raise _error(self.path, f"'{key}' is an array of the type {item}")
        what = f"{'strings' if item == STRING else 'items'} of '{key}'"
        self.fits(count, 8 if item == STRING else struct.calcsize("<" + SCALARS[item]), what, MAX_ITEMS - self.items)
        self.items += count
        if item == STRING:
            return self.strings(count), (kind, item)
        return list(self.take(f"<{count}{SCALARS[item]}")), (kind, item)

    def string(self) -> str:
        (text,) = self.strings(1)
        return text

    def strings(self, count: int) -> list[str]:
        """The next strings; bytes that are no UTF-8 are replaced."""
        out = []
        data, at = self.data, self.at  # local: a vocabulary has hundreds of thousands
        for _ in range(count):
            begin = at + 8
            if begin > len(data):
                self.reach(begin)
            (length,) = _LENGTH.unpack_from(data, at)
            at = begin + length
            if at > len(data):
                self.at = begin
                self.fits(length, 1, "bytes of a string", MAX_HEADER_BYTES)
                self.reach(at)
            out.append(str(data[begin:at], "utf-8", "replace"))
        self.at = at
        return out

    def fits(self, count: int, nbytes: int, what: str, most: int) -> None:
        """Error unless the rest of the file can hold `count` things of at least `nbytes`, and they are not too many."""
        if count * nbytes > self.size - self.at:
            raise _error(self.path, f"damaged: {count} {what} in {self.size - self.at} bytes")
        if count > most:
            raise _error(self.path, f"{count} {what}, at most {most} are read")

    def take(self, form: str) -> tuple[Any, ...]:
        end = self.at + struct.calcsize(form)
        self.reach(end)
        values = struct.unpack_from(form, self.data, self.at)
        self.at = end
        return values

    def reach(self, end: int) -> None:
        """Read on until `data` holds the file's first `end` bytes."""
        have = len(self.data)
        if end <= have:
            return
        if end > self.size:
            raise _error(self.path, "damaged: it ends within its header")
        if end > MAX_HEADER_BYTES:
            raise _error(self.path, f"damaged: a header of more than {MAX_HEADER_BYTES >> 20} MiB")
        wanted = min(self.size, MAX_HEADER_BYTES, max(end, 2 * have, _FIRST_READ))
        self.data += bytes(wanted - have)
        with memoryview(self.data) as view:
            if read_exactly(self.descriptor, view[have:], have) < wanted - have:
                raise changed(shown(self.path.name))
