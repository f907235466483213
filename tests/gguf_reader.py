"""Read a GGUF file by its definition (docs/gguf.md of ggml), for tests; the gguf package refuses Q2_0."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficli.ops import ggml

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Tensor:
    type: str
    shape: tuple[int, ...]
    data: bytes


class Reader:
    """Metadata as plain values, tensors with their bytes."""

    def __init__(self, path: Path) -> None:
        self.bytes, self.at = path.read_bytes(), 0
        magic, version, tensors, fields = self.take("<4sIQQ")
        assert (magic, version) == (b"GGUF", 3)
        self.metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self.string()
            self.metadata[key] = self.value(self.take("<I")[0])
        infos = [self.info() for _ in range(tensors)]
        start = -(-self.at // 32) * 32
        self.tensors = {}
        for name, shape, number, offset in infos:
            kind = ggml.type_name(number)
            rows = 1
            for n in shape[:-1]:
                rows *= n
            assert offset % 32 == 0
            begin = start + offset
            self.tensors[name] = Tensor(kind, shape, self.bytes[begin : begin + rows * ggml.row_bytes(kind, shape[-1])])
        assert len(self.bytes) % 32 == 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.bytes, self.at)
        self.at += struct.calcsize(form)
        return values

    def string(self) -> str:
        (size,) = self.take("<Q")
        return self.take(f"{size}s")[0].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item, count = self.take("<IQ")
            return [self.value(item) for _ in range(count)]
        return self.take("<" + SCALARS[kind])[0]

    def info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        (dims,) = self.take("<I")
        shape = self.take(f"<{dims}Q")[::-1]
        number, offset = self.take("<IQ")
        return name, shape, number, offset
