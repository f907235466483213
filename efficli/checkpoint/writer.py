"""Write a checkpoint from another one, tensor by tensor: memory holds one chunk, whatever the size of the model.

What is not changed is copied byte for byte. The bytes that are written depend on the source and on what is asked for
alone: tensors are ordered by name, however the source spreads them over files.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint.carry import carry_packed, carry_small_files
from efficli.checkpoint.header import BITS, TensorRef
from efficli.checkpoint.reader import Checkpoint
from efficli.checkpoint.shards import INDEX, SINGLE
from efficli.checkpoint.sidecar import Packed
from efficli.errors import CheckpointError
from efficli.ops.storage import sync_directory, sync_file, unconfirmed, write_file, writing
from efficli.progress import Progress, Silent

MAX_SHARD_BYTES = 5 * 10**9
"""Weights of one file at most, if they are more than one tensor."""

_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTensor:
    """A tensor to write: bytes of a tensor of the source, or what `content` makes."""

    name: str
    dtype: str
    """safetensors' name of it."""
    shape: tuple[int, ...]
    source: str | None = None
    """The tensor of the source that it is or is made from."""
    content: Callable[[], Iterator[NDArray[Any]]] | None = None
    """Makes its values, as stored (`as_stored`), in row-major pieces, when its turn comes; None: those of `source`."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return (int(np.prod(self.shape, dtype=object)) * BITS[self.dtype] + 7) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a new checkpoint holds beside its weights."""

    packed: Mapping[str, Packed]
    """Packed blocks that are still true, for its sidecar."""
    notes: tuple[str, ...]
    """What was not taken over: packed blocks of edited tensors, files that are too large."""


def copied(tensor: TensorRef, name: str | None = None) -> NewTensor:
    """The tensor as it is, under another `name` if one is given."""
    return NewTensor(name=name or tensor.name, dtype=tensor.dtype, shape=tensor.shape, source=tensor.name)


def as_stored(values: NDArray[np.float32], dtype: str, where: str) -> NDArray[Any]:
    """Float32 values rounded to the nearest of `dtype` (F64, F32, F16, BF16), which must be able to hold them."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        bits = bits + (0x7FFF + ((bits >> 16) & 1))
        stored: NDArray[Any] = (bits >> 16).astype("<u2")
        finite = (stored & 0x7F80) != 0x7F80
    else:
        with np.errstate(over="ignore"):
            stored = values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
        finite = np.isfinite(stored)
    if not finite.all():
        raise CheckpointError(f"new values are not finite, or too large for {dtype}", where=where)
    return stored


def write_checkpoint(
    ckpt: Checkpoint,
    folder: Path,
    tensors: Sequence[NewTensor],
    *,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    headers_only: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write `tensors`, `config` (None: that of `ckpt`) and every small file of `ckpt` into the empty `folder`; synced.

    The sidecar is left to the caller. With `headers_only` the files have their sizes, and holes for values.
    OutputError: it cannot be written. CheckpointError: the source changed, or new values do not fit their dtype.
    """
    progress = progress or Silent()
    shards = _spread(sorted(tensors, key=lambda t: natural(t.name)), max_shard_bytes)
    progress.start("writing", sum(t.nbytes for t in tensors), "B")
    for file, members in shards.items():
        _write_shard(ckpt, folder / file, members, headers_only, progress)
    progress.finish()
    if len(shards) > 1:
        _write_index(folder, shards)
    _write_config(ckpt, folder, config)
    notes = carry_small_files(ckpt, folder)
    kept = {t.name: t.source for t in tensors if t.source is not None and t.content is None}
    edited = [t.source for t in tensors if t.source is not None and t.content is not None]
    packed, dropped = carry_packed(ckpt, folder, kept, edited, headers_only=headers_only)
    ckpt.check_unchanged()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync_file(path)
    try:
        sync_directory(folder)
    except OSError as error:
        raise unconfirmed(error, folder) from error
    return Written(packed=packed, notes=(*notes, *dropped))


def natural(name: str) -> list[tuple[str, int]]:
    """A key that sorts names as a reader would: layers.2 before layers.10."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)]


def _spread(tensors: Sequence[NewTensor], limit: int) -> dict[str, list[NewTensor]]:
    """File name -> its tensors: as many as have room, in order."""
    groups: list[list[NewTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    for group in groups:  # wide types first: every tensor begins at a multiple of its item's size (sorting is stable)
        group.sort(key=lambda t: -BITS[t.dtype])
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def _write_shard(
    ckpt: Checkpoint, path: Path, tensors: Sequence[NewTensor], headers_only: bool, progress: Progress
) -> None:
    """One safetensors file."""
    head = _header(tensors)
    with writing(path):
        file = path.open("xb")
    with file:
        _put(file, path, head)
        for tensor in tensors:
            if not headers_only:
                _write_tensor(ckpt, file, path, tensor, progress)
        with writing(path):
            if headers_only:
                file.truncate(len(head) + sum(t.nbytes for t in tensors))
            file.flush()


def _header(tensors: Sequence[NewTensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_tensor(ckpt: Checkpoint, file: BinaryIO, path: Path, tensor: NewTensor, progress: Progress) -> None:
    written = 0
    pieces = _bytes_of(ckpt, tensor) if tensor.content is None else (_flat(piece) for piece in tensor.content())
    for piece in pieces:
        for start in range(0, len(piece), _CHUNK_BYTES):
            part = piece[start : start + _CHUNK_BYTES]
            _put(file, path, part)
            progress.advance(len(part))
        written += len(piece)
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: {written} bytes for {tensor.dtype} {tensor.shape}")


def _bytes_of(ckpt: Checkpoint, tensor: NewTensor) -> Iterator[memoryview]:
    """The stored bytes of the source."""
    if tensor.source is None or ckpt.tensors[tensor.source].nbytes != tensor.nbytes:
        raise ValueError(f"{tensor.name} is not a copy of {tensor.source}")
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, tensor.nbytes)))
    for start in range(0, tensor.nbytes, _CHUNK_BYTES):
        part = buffer[: min(_CHUNK_BYTES, tensor.nbytes - start)]
        ckpt.read_into(tensor.source, start, part)
        yield part


def _flat(piece: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data


def _put(file: BinaryIO, path: Path, data: bytes | memoryview) -> None:
    with writing(path):
        file.write(data)


def _write_index(folder: Path, shards: Mapping[str, Sequence[NewTensor]]) -> None:
    weight_map = {tensor.name: file for file, members in shards.items() for tensor in members}
    total = sum(tensor.nbytes for members in shards.values() for tensor in members)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_file(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _write_config(ckpt: Checkpoint, folder: Path, config: Mapping[str, Any] | None) -> None:
    """config.json: the source's own bytes where nothing in it changes."""
    source = ckpt.file("config.json")
    if source is not None and (config is None or config == ckpt.config):
        write_file(folder / "config.json", source.read_bytes())
    else:
        write_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
