"""A checkpoint's fingerprint: SHA-256 over its configuration and over name, dtype, shape and bytes of every tensor.

It does not depend on how tensors are spread over files. A reader that hashes tensors anyway (an encoder) makes the
same fingerprint with `fingerprint_of` and saves the second read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from efficli.checkpoint.files import Stamp, open_regular, read_exactly
from efficli.checkpoint.header import TensorRef
from efficli.errors import CheckpointError
from efficli.progress import Progress, Silent

TensorHash = tuple[str, tuple[int, ...], str]
"""dtype, shape, SHA-256 of the bytes in hexadecimal."""

_SLAB_BYTES = 1 << 22


def fingerprint_of(config: Mapping[str, Any], tensors: Mapping[str, TensorHash]) -> str:
    """`sha256:...` of a configuration (its values; layout and order of config.json do not matter) and tensor hashes."""
    rows = [[name, dtype, list(shape), digest] for name, (dtype, shape, digest) in sorted(tensors.items())]
    text = json.dumps([config, rows], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def hash_tensor(tensor: TensorRef, stamp: Stamp | None = None, progress: Progress | None = None) -> str:
    """SHA-256 of a tensor's bytes in hexadecimal, read in slabs; an error if its file no longer has `stamp`."""
    progress = progress or Silent()
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_SLAB_BYTES, tensor.nbytes)))
    with open_regular(tensor.file, tensor.file.name) as (descriptor, found):
        if stamp is not None and found != stamp:
            raise CheckpointError("input changed while reading", where=tensor.file.name)
        for start in range(0, tensor.nbytes, _SLAB_BYTES):
            part = buffer[: min(_SLAB_BYTES, tensor.nbytes - start)]
            if read_exactly(descriptor, part, tensor.offset + start) < len(part):
                raise CheckpointError("input changed while reading", where=tensor.file.name)
            digest.update(part)
            progress.advance(len(part))
    return digest.hexdigest()
