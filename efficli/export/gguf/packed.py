"""Packed blocks: a tensor's exact codes, chosen by a pass and kept beside the weights, copied verbatim."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from math import prod

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError
from efficli.export.gguf.layout import OutTensor
from efficli.export.gguf.types import TypeChoice
from efficli.ops.ggml import row_bytes
from efficli.ops.ggml_types import TYPE_IDS

_BY_ROWS = ("copy", "permute", "stack", "slice", "transpose")
"""Transforms that only move whole rows of the logical matrix (out, in), and with them the rows of blocks.

Blocks of a matrix that is stored (in, out) are rows of the logical one, too.
"""


class PackedBlocks:
    """The packed blocks of a checkpoint by rows of output tensors; safe to use from several threads."""

    def __init__(self, ckpt: Checkpoint) -> None:
        self._ckpt = ckpt
        self._lock = threading.Lock()
        self._loaded: dict[str, NDArray[np.uint8]] = {}

    def type_of(self, tensor: OutTensor) -> str | None:
        """The type of the blocks that all sources of a tensor have, if they can be copied."""
        sidecar = self._ckpt.sidecar
        if sidecar is None or tensor.transform not in _BY_ROWS or not tensor.sources:
            return None
        kinds = {sidecar.packed[name].type if name in sidecar.packed else None for name in tensor.sources}
        kind = kinds.pop()
        return kind.upper() if kind and not kinds and kind.upper() in TYPE_IDS else None

    def rows(self, tensor: OutTensor, start: int, stop: int) -> NDArray[np.uint8]:
        """The blocks of rows [start, stop), which lie within one matrix; CheckpointError if their size is wrong."""
        group = tensor.shape[-2]
        source = tensor.sources[start // group if tensor.transform == "stack" else 0]
        blocks = self._load(tensor, source)
        wanted = np.arange(start, stop)
        if tensor.transform == "stack":
            wanted %= group
        elif tensor.transform == "slice":
            wanted = wanted // group * self._ckpt.tensors[source].shape[-2] + tensor.span[0] + wanted % group
        elif tensor.transform == "permute":
            half = group // tensor.heads // 2
            wanted = np.arange(group).reshape(tensor.heads, 2, half).swapaxes(1, 2).reshape(-1)[start:stop]
        return blocks[wanted].reshape(-1)

    def _load(self, tensor: OutTensor, source: str) -> NDArray[np.uint8]:
        """All blocks of a source (rows, bytes); the last two are kept, as threads work on neighbouring tensors."""
        with self._lock:
            if source not in self._loaded:
                data = self._ckpt.packed_blocks(source) or b""
                rows = prod(self._ckpt.tensors[source].shape) // tensor.shape[-1]
                expected = (rows, row_bytes(self.type_of(tensor) or "", tensor.shape[-1]))
                if len(data) != expected[0] * expected[1]:
                    message = f"{len(data)} bytes of packed blocks, expected {expected[0] * expected[1]}"
                    raise CheckpointError(message, where=source)
                while len(self._loaded) > 1:
                    del self._loaded[next(iter(self._loaded))]
                self._loaded[source] = np.frombuffer(data, np.uint8).reshape(expected)
            return self._loaded[source]


def notes(ckpt: Checkpoint, tensors: Iterable[OutTensor], choice: TypeChoice) -> list[str]:
    """What becomes of packed blocks that this file does not take: a wish of a pass that is not fulfilled."""
    sidecar = ckpt.sidecar
    blocks = PackedBlocks(ckpt)
    lines = []
    for tensor in tensors:
        chosen = choice.types[tensor.name]
        kinds = {sidecar.packed[name].type for name in tensor.sources if name in sidecar.packed} if sidecar else set()
        if kinds and chosen != blocks.type_of(tensor):
            lines.append(
                f"{tensor.name}: encoded anew as {chosen}, not copied from its {', '.join(sorted(kinds))} blocks"
            )
    return lines
