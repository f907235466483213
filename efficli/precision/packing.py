"""The exact codes of rounding with error feedback, kept beside the weights: exporters copy them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from efficli.checkpoint import Checkpoint
from efficli.checkpoint.safetensors_file import write_file
from efficli.checkpoint.sidecar import PACKED_METADATA, Packed
from efficli.ops import ggml
from efficli.ops.storage import sync_file, writing
from efficli.precision.curves import Rows, row_reader
from efficli.precision.encoder import Encoder
from efficli.precision.view import FileTensor, Part
from efficli.precision.work import Workshop
from efficli.surgery import matrices

ROUNDED = "efficli-rounded.safetensors"
"""Where they are: beside packed blocks of an earlier pass, which hold for the same weights."""


def write_codes(ckpt: Checkpoint, folder: Path, shop: Workshop, types: Mapping[str, str]) -> dict[str, Packed]:
    """Write the codes of all tensors that are rounded with error feedback; the sidecar's entries for them.

    One tensor is in memory at a time. Codes lie by tensors of the checkpoint, the matrices of a stack one after the
    other.
    """
    encoder = Encoder(shop.statistics, rounding=shop.rounding, threads=shop.context.num_threads)
    read = row_reader(ckpt, matrices(ckpt))
    wanted = [tensor for tensor in shop.view.tensors if encoder.feeds_back(tensor, types[tensor.name])]
    shop.context.progress.start("rounding", sum(tensor.num_weights for tensor in wanted), "weights")
    hashes: dict[str, str] = {}
    contents: dict[str, tuple[str, tuple[int, ...], Callable[[], bytes]]] = {}
    kinds: dict[str, str] = {}
    for tensor in wanted:
        for source in dict.fromkeys(part.name for part in tensor.parts):
            places = [(number, part) for number, part in enumerate(tensor.parts) if part.name == source]
            kind = kinds[source] = types[tensor.name]
            size = sum(part.stop - part.start for _, part in places) * ggml.row_bytes(kind, tensor.columns)
            make = partial(_codes, shop, encoder, read, tensor, kind, places, source, hashes)
            contents[source] = ("U8", (size,), make)
    if contents:
        with writing(folder / ROUNDED):
            write_file(folder / ROUNDED, contents, PACKED_METADATA)
        sync_file(folder / ROUNDED)
    shop.context.progress.finish()
    return {source: Packed(type=kinds[source], file=ROUNDED, sha256=hashes[source]) for source in contents}


def _codes(
    shop: Workshop,
    encoder: Encoder,
    read: Rows,
    tensor: FileTensor,
    kind: str,
    places: list[tuple[int, Part]],
    source: str,
    hashes: dict[str, str],
) -> bytes:
    """The codes of a tensor of the checkpoint; its hash goes into `hashes`."""
    found = []
    for number, part in places:
        rows = read(part, 0, part.stop - part.start)
        found.append(encoder.encode(tensor, number, kind, rows))
        shop.context.progress.advance(rows.size)
    data = np.concatenate(found).tobytes()
    hashes[source] = hashlib.sha256(data).hexdigest()
    return data
