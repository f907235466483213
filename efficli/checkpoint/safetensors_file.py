"""Write a safetensors file tensor by tensor, without torch: header first, then the bytes as they come."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from efficli.checkpoint.header import BITS

Data = bytes | memoryview | Callable[[], bytes]
"""A tensor's bytes, or what makes them when its turn comes."""


def write_file(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], Data]], metadata: Mapping[str, str]
) -> None:
    """Write name -> (dtype, shape, bytes) as the new file `path`, in the order given; sizes are checked."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        nbytes = math.prod(shape) * BITS[dtype] // 8
        if not callable(data):
            _check_size(name, data, nbytes)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # data begins at a multiple of 8, so that a mapped file can be viewed as any dtype
    header += b" " * (-len(header) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, (dtype, shape, data) in tensors.items():
            made = data() if callable(data) else data
            _check_size(name, made, math.prod(shape) * BITS[dtype] // 8)
            file.write(made)


def _check_size(name: str, data: bytes | memoryview, nbytes: int) -> None:
    if memoryview(data).nbytes != nbytes:
        raise ValueError(f"{name}: {memoryview(data).nbytes} bytes, expected {nbytes}")
