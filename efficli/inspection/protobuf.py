"""Walk over a file of protocol buffers without a schema: field by field, by position, in bounded memory.

Source: the wire format of protobuf.dev. Lengths are checked against the message that holds them before anything is
read, groups (long deprecated) are refused, and the number of fields is limited.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from efficli.checkpoint.files import changed, read_exactly
from efficli.errors import CheckpointError

MAX_FIELDS = 1 << 22
"""4 million; a graph of 20 thousand nodes has 0.4."""
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

_WINDOW = 1 << 18
_FIXED = {FIXED64: 8, FIXED32: 4}

Field = tuple[int, int, int, int]
"""Number, wire type, then the value and 0 (VARINT), or the first and last (exclusive) byte."""


class Wire:
    """A file being walked over; `descriptor` stays the caller's."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path, self.descriptor, self.size = path, descriptor, size
        self.num_fields = 0
        self._buffer = b""
        self._base = 0

    def fields(self, start: int, stop: int) -> Iterator[Field]:
        """The fields of the message in bytes [start, stop); CheckpointError where that is none."""
        at = start
        while at < stop:
            self.num_fields += 1
            if self.num_fields > MAX_FIELDS:
                raise self.error(f"more than {MAX_FIELDS} fields", at)
            tag, at = self.varint(at, stop)
            number, kind = tag >> 3, tag & 7
            if not 1 <= number < 1 << 29:
                raise self.error(f"field number {number}", at)
            if kind == VARINT:
                value, at = self.varint(at, stop)
                yield number, kind, value, 0
                continue
            if kind == BYTES:
                length, at = self.varint(at, stop)
            elif kind in _FIXED:
                length = _FIXED[kind]
            else:
                raise self.error(f"wire type {kind}", at)
            if length > stop - at:
                raise self.error(f"a field of {length} bytes, {stop - at} are left", at)
            yield number, kind, at, at + length
            at += length

    def varint(self, at: int, stop: int) -> tuple[int, int]:
        """The number at a byte, and the byte after it."""
        i = at - self._base
        if i < 0 or i + 10 > len(self._buffer):
            self._fill(at)
            i = 0
        buffer = self._buffer
        value = shift = 0
        while at < stop and shift < 70:
            byte = buffer[i]
            i, at = i + 1, at + 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
            shift += 7
        raise self.error("a number that does not end", at)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop); the caller has judged their number."""
        i = start - self._base
        if i < 0 or i + stop - start > len(self._buffer):
            if stop - start > _WINDOW:
                return self._bytes(start, stop - start)
            self._fill(start)
            i = 0
        return self._buffer[i : i + stop - start]

    def text(self, start: int, stop: int, most: int = 1 << 12) -> str:
        """A string of at most `most` bytes; more are an error."""
        if stop - start > most:
            raise self.error(f"a name of {stop - start} bytes", start)
        return self.read(start, stop).decode("utf-8", "replace")

    def error(self, what: str, at: int) -> CheckpointError:
        """The error for what no writer writes."""
        hint = "copy or make the whole file again; if it is no ONNX model, give one"
        return CheckpointError(f"not an ONNX model, or damaged: {what} at byte {at}", where=self.path.name, hint=hint)

    def _fill(self, at: int) -> None:
        self._buffer = self._bytes(at, min(_WINDOW, self.size - at))
        self._base = at

    def _bytes(self, at: int, count: int) -> bytes:
        data = bytearray(count)
        if read_exactly(self.descriptor, memoryview(data), at) < count:
            raise changed(self.path.name)
        return bytes(data)


def signed(value: int, bits: Literal[32, 64] = 64) -> int:
    """A varint as the signed number that protobuf's int64 and int32 mean by it."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value
