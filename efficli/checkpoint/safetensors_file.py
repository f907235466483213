"""Write a safetensors file tensor by tensor, without torch: header first, then the bytes as they come."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from efficli.checkpoint.header import BITS


def write_file(
    path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes | memoryview]], metadata: Mapping[str, str]
) -> None:
    """Write name -> (dtype, shape, bytes) as the new file `path`, in the order given; sizes are checked."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        count = 1
        for n in shape:
            count *= n
        nbytes = memoryview(data).nbytes
        if nbytes * 8 != count * BITS[dtype]:
            raise ValueError(f"{name}: {nbytes} bytes for {dtype} {shape}")
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # data begins at a multiple of 8, so that a mapped file can be viewed as any dtype
    header += b" " * (-len(header) % 8)
    with path.open("xb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _, _, data in tensors.values():
            file.write(data)
