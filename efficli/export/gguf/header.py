"""The part of a GGUF file before its data, as bytes: magic, metadata, tensor table (GGUF version 3, little-endian).

Source: ggml's docs/gguf.md. Written here and not by gguf's GGUFWriter, as that knows neither Q1_0 nor Q2_0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from gguf import GGUFValueType

from efficli.export.gguf.layout import Field

ALIGNMENT = 32
"""Bytes; llama.cpp's default, so `general.alignment` is not written."""

_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as stored: `shape` in numpy order, `type_id` of ggml, `nbytes` without padding."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies: `head` are the file's first bytes, `offsets` absolute positions of the tensors' data."""

    head: bytes
    offsets: tuple[int, ...]
    nbytes: int


def lay_out(metadata: Mapping[str, Field], tensors: Sequence[StoredTensor]) -> Layout:
    """Serialise the header and place each tensor's data, aligned, in the given order."""
    places, nbytes = _places(tensors)
    out = bytearray(_begin(len(tensors), len(metadata)))
    out += pack(metadata)
    out += _table(tensors, places)
    start = _aligned(len(out))
    out += bytes(start - len(out))
    return Layout(bytes(out), tuple(start + place for place in places), start + nbytes)


def measure(packed: int, tensors: Sequence[StoredTensor]) -> int:
    """`lay_out(metadata, tensors).nbytes` where `pack(metadata)` has `packed` bytes."""
    places, nbytes = _places(tensors)
    return _aligned(len(_begin(0, 0)) + packed + len(_table(tensors, places))) + nbytes


def pack(metadata: Mapping[str, Field]) -> bytes:
    """Keys and values as they stand in the file; with a large vocabulary some megabytes."""
    return b"".join(part for key, field in metadata.items() for part in (_string(key), _value(key, field)))


def _begin(tensors: int, fields: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)


def _places(tensors: Sequence[StoredTensor]) -> tuple[list[int], int]:
    """Where each tensor's data begins, counted from the first one's, and the length of all data."""
    places, relative = [], 0
    for tensor in tensors:
        places.append(relative)
        relative = _aligned(relative + tensor.nbytes)
    return places, relative


def _table(tensors: Sequence[StoredTensor], places: Sequence[int]) -> bytes:
    out = bytearray()
    for tensor, place in zip(tensors, places, strict=True):
        dims = tensor.shape[::-1]
        out += _string(tensor.name)
        out += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, tensor.type_id, place)
    return bytes(out)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _strings(texts: Iterable[str]) -> bytes:
    data = [text.encode() for text in texts]
    lengths = map(struct.Struct("<Q").pack, map(len, data))
    return b"".join(chain.from_iterable(zip(lengths, data, strict=True)))


def _value(key: str, field: Field) -> bytes:
    if field.type is not GGUFValueType.ARRAY:
        return struct.pack("<I", field.type) + _scalar(key, field.type, field.value)
    item = field.item
    if item is None or not len(field.value):
        raise ValueError(f"{key}: an array needs a type and at least one item")
    head = struct.pack("<IIQ", field.type, item, len(field.value))
    if item is GGUFValueType.STRING:
        return head + _strings(field.value)
    if item not in _FORMATS:
        raise ValueError(f"{key}: arrays of {item.name} are not written")
    return head + struct.pack(f"<{len(field.value)}{_FORMATS[item]}", *field.value)


def _scalar(key: str, kind: GGUFValueType, value: Any) -> bytes:
    if kind is GGUFValueType.STRING:
        return _string(value)
    if kind not in _FORMATS:
        raise ValueError(f"{key}: values of {kind.name} are not written")
    return struct.pack(f"<{_FORMATS[kind]}", value)
