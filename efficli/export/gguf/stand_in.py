"""A GGUF file of random weights with the shape of a real model: what its speed is measured on, never its text.

Weights are one encoded slab over and over, so that hundreds of megabytes cost no encoding. No vocabulary: token ids in,
token ids out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from efficli.export.gguf.header import StoredTensor, lay_out
from efficli.export.gguf.layout import Metadata, f32, string, u32
from efficli.ops import ggml
from efficli.ops.storage import writing

LAYERS = 32
"""At most; a token's overhead grows with them, so they are about as many as models of a billion weights have."""

_SLAB_ROWS = 256
_WRITE = 8 << 20
_EPS = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of a Llama; heads are 64 wide, a quarter of them hold keys and values."""

    layers: int
    hidden: int
    ffn: int
    vocab: int = 256
    ctx: int = 256

    @classmethod
    def of_bytes(cls, nbytes: int, kind: str) -> Shape:
        """As many layers as come nearest to `nbytes` in type `kind`, at least one, each twice as wide beyond LAYERS."""
        shape = cls(layers=1, hidden=1024, ffn=4096)
        while nbytes > (LAYERS + 0.5) * shape.nbytes(kind):
            shape = replace(shape, hidden=2 * shape.hidden, ffn=2 * shape.ffn)
        return replace(shape, layers=max(1, round(nbytes / shape.nbytes(kind))))

    @property
    def narrow(self) -> Shape:
        """As many layers, and next to no weights: what takes its time is all but reading."""
        return replace(self, hidden=256, ffn=256)

    def nbytes(self, kind: str) -> int:
        """Of all tensors."""
        return sum(_stored(name, shape, kind).nbytes for name, shape in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes (rows, columns), in the order of the file."""
        hidden, keys = self.hidden, self.hidden // 4
        yield "token_embd.weight", (self.vocab, hidden)
        for n in range(self.layers):
            yield f"blk.{n}.attn_norm.weight", (hidden,)
            yield f"blk.{n}.attn_q.weight", (hidden, hidden)
            yield f"blk.{n}.attn_k.weight", (keys, hidden)
            yield f"blk.{n}.attn_v.weight", (keys, hidden)
            yield f"blk.{n}.attn_output.weight", (hidden, hidden)
            yield f"blk.{n}.ffn_norm.weight", (hidden,)
            yield f"blk.{n}.ffn_gate.weight", (self.ffn, hidden)
            yield f"blk.{n}.ffn_up.weight", (self.ffn, hidden)
            yield f"blk.{n}.ffn_down.weight", (hidden, self.ffn)
        yield "output_norm.weight", (hidden,)
        yield "output.weight", (self.vocab, hidden)

    def metadata(self) -> Metadata:
        """What llama.cpp asks for."""
        heads = self.hidden // 64
        return {
            "general.architecture": string("llama"),
            "llama.block_count": u32(self.layers),
            "llama.context_length": u32(self.ctx),
            "llama.embedding_length": u32(self.hidden),
            "llama.feed_forward_length": u32(self.ffn),
            "llama.attention.head_count": u32(heads),
            "llama.attention.head_count_kv": u32(heads // 4),
            "llama.attention.layer_norm_rms_epsilon": f32(_EPS),
            "llama.vocab_size": u32(self.vocab),
            "tokenizer.ggml.model": string("none"),
        }


def write_stand_in(path: Path, shape: Shape, kind: str, seed: int = 0) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """Write the file with every matrix of type `kind`, norms F32; type, bytes and shape of each tensor. OutputError."""
    stored = [_stored(name, size, kind) for name, size in shape.tensors()]
    layout = lay_out(shape.metadata(), stored)
    widths = {tensor.shape[-1] for tensor in stored if len(tensor.shape) > 1}
    random = np.random.default_rng(seed)
    slabs = {width: _slab(random, width, kind) for width in sorted(widths)}
    with writing(path), path.open("wb") as file:
        file.write(layout.head)
        for tensor, offset in zip(stored, layout.offsets, strict=True):
            file.seek(offset)
            if len(tensor.shape) == 1:
                file.write(np.ones(tensor.shape, np.float32).data)
                continue
            slab, left = slabs[tensor.shape[-1]], tensor.nbytes
            while left:
                left -= file.write(slab[: min(left, len(slab))])
        file.truncate(layout.nbytes)
    return {tensor.name: (kind if len(tensor.shape) > 1 else "F32", tensor.nbytes, tensor.shape) for tensor in stored}


def _stored(name: str, shape: tuple[int, ...], kind: str) -> StoredTensor:
    if len(shape) == 1:
        return StoredTensor(name, shape, ggml.type_id("F32"), 4 * shape[0])
    return StoredTensor(name, shape, ggml.type_id(kind), shape[0] * ggml.row_bytes(kind, shape[1]))


def _slab(random: np.random.Generator, width: int, kind: str) -> memoryview:
    """Whole encoded rows of this width, several megabytes of them."""
    rows = random.standard_normal((_SLAB_ROWS, width), np.float32) * np.float32(0.02)
    encoded = np.empty(_SLAB_ROWS * ggml.row_bytes(kind, width), np.uint8)
    ggml.encode(kind, rows, encoded)
    return memoryview(encoded.tobytes() * max(1, math.ceil(_WRITE / encoded.nbytes)))
