"""A GGUF file with another header: its metadata, its tensors' types or names changed, the data as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gguf import GGUFValueType

from efficli.export.gguf.header import StoredTensor, lay_out
from efficli.export.gguf.layout import Field, Metadata
from efficli.export.gguf.parse import read_gguf
from efficli.ops.ggml_types import TYPE_IDS


def rewrite(
    path: Path,
    change: Callable[[Metadata], object] = lambda metadata: None,
    *,
    drop: Callable[[str], bool] = lambda name: False,
    rename: Callable[[str], str] = lambda name: name,
) -> Path:
    """Write `path` anew after `change` of its metadata, without the tensors that `drop` names."""
    header = read_gguf(path)
    whole = path.read_bytes()
    fields = {
        key: Field(value, GGUFValueType(header.kinds[key][0]), _item(header.kinds[key][1]))
        for key, value in header.metadata.items()
    }
    change(fields)
    kept = {rename(name): tensor for name, tensor in header.tensors.items() if not drop(name)}
    stored = [StoredTensor(name, t.shape, TYPE_IDS[t.type], t.nbytes) for name, t in kept.items()]
    layout = lay_out(fields, stored)
    data = bytearray(layout.nbytes)
    data[: len(layout.head)] = layout.head
    for tensor, offset in zip(kept.values(), layout.offsets, strict=True):
        data[offset : offset + tensor.nbytes] = whole[tensor.offset : tensor.offset + tensor.nbytes]
    path.write_bytes(data)
    return path


def _item(number: int | None) -> GGUFValueType | None:
    return None if number is None else GGUFValueType(number)
