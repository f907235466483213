"""ggml's blocks taken apart and put together: the codes of the weights, and the scales that stay as they are.

A block is a string of bits, so a type is told by where each bit of a code and of a scale lies (block_layouts.py), and
reading and writing are the same for all. Blocks are little-endian; bit 0 of a byte is its lowest.
Source: struct block_* of ggml-common.h and dequantize_row_* of ggml-quants.c, llama.cpp of ggml 0.25.

Every value is scale × level - offset (scalar types) or scale × sign × grid (vector types). The products have at most
24 significant bits, so they are exact in float32, and the order of the operations, fused or not, makes no difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from efficli.errors import UnsupportedError
from efficli.ops import ggml
from efficli.ops.block_layouts import LAYOUTS, Layout

SCALAR_TYPES = tuple(name for name, layout in LAYOUTS.items() if layout.group == 1)
"""Types whose weights each have a code of their own."""

VECTOR_TYPES = tuple(name for name, layout in LAYOUTS.items() if layout.group > 1)
"""Types with one code for 4 or 8 neighbours: an entry of a grid of vectors, and the signs of its elements."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """Encoded rows, taken apart.

    `codes` (rows, columns / group): for scalar types the bits as they are stored; for vector types the index into
    `grid` plus the signs (1 is minus, element i at bit i) shifted left by `layout.index_bits`.
    `scales` and `offsets` (rows, columns / layout.run) hold for `layout.run` neighbouring columns each.
    """

    layout: Layout
    data: NDArray[np.uint8]
    codes: NDArray[np.uint32]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32] | None

    def decode(self, codes: NDArray[np.uint32]) -> NDArray[np.float32]:
        """The weights (rows, columns) that these codes mean, bit for bit as ggml decodes `pack(codes)`."""
        rows, groups = codes.shape
        layout = self.layout
        if layout.group == 1:
            units = levels(layout.name)[codes]
        else:
            units = grid(layout.name)[codes & ((1 << layout.index_bits) - 1)]
            signs = (codes[..., None] >> (layout.index_bits + np.arange(layout.group, dtype=np.uint32))) & 1
            units = np.where(signs == 1, -units, units)
        values = units.reshape(rows, -1, layout.run) * self.scales[..., None]
        if self.offsets is not None:
            values -= self.offsets[..., None]
        return values.reshape(rows, groups * layout.group)

    def pack(self, codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """The bytes of these rows with other codes; ValueError for codes that the type cannot hold.

        With an odd number of minus signs among 8 weights the types that do not store the eighth cannot hold them.
        """
        layout = self.layout
        if codes.shape != self.codes.shape:
            raise ValueError(f"codes have the shape {codes.shape}, expected {self.codes.shape}")
        if codes.size and int(codes.max()) >> layout.code_bits:
            raise ValueError(f"a code of {layout.name} has {layout.code_bits} bits, found {int(codes.max())}")
        blocks = codes.reshape(-1, layout.block // layout.group)
        if layout.parity and np.any(_odd_signs(layout, blocks)):
            raise ValueError(f"{layout.name} stores an even number of minus signs in 8 weights, found an odd one")
        bits = _bits(layout, self.data)
        for number, places in enumerate(layout.codes):
            stored = places >= 0
            bits[:, places[stored]] = (blocks[:, stored] >> np.uint32(number)) & 1
        return np.packbits(bits, axis=1, bitorder="little").reshape(-1)

    def part(self, start: int, stop: int) -> Blocks:
        """The rows from `start` to `stop`; views."""
        width = self.data.size // len(self.codes)
        rows = slice(start, stop)
        offsets = None if self.offsets is None else self.offsets[rows]
        return replace(
            self,
            data=self.data[start * width : stop * width],
            codes=self.codes[rows],
            scales=self.scales[rows],
            offsets=offsets,
        )


def unpack(kind: str, data: NDArray[np.uint8], rows: int, columns: int) -> Blocks:
    """Take `rows` encoded rows of `columns` weights apart; UnsupportedError for a type not known here."""
    layout = LAYOUTS.get(kind)
    if layout is None:
        raise UnsupportedError(f"type {kind}: cannot be taken apart, expected one of {', '.join(LAYOUTS)}")
    data = data[: rows * ggml.row_bytes(kind, columns)]
    bits = _bits(layout, data)
    codes = np.zeros((len(bits), layout.block // layout.group), np.uint32)
    for number, places in enumerate(layout.codes):
        stored = places >= 0
        codes[:, stored] |= bits[:, places[stored]].astype(np.uint32) << np.uint32(number)
    if layout.parity:
        # the sign that is not stored is the last of the last group of each 8 weights: it makes their number even
        last = 8 // layout.group - 1
        codes[:, last :: last + 1] |= _odd_signs(layout, codes).astype(np.uint32) << np.uint32(layout.code_bits - 1)
    scales, offsets = _scales(layout, bits, data.reshape(len(bits), -1))
    return Blocks(
        layout=layout,
        data=data,
        codes=codes.reshape(rows, -1),
        scales=scales.reshape(rows, -1),
        offsets=None if offsets is None else offsets.reshape(rows, -1),
    )


@cache
def levels(kind: str) -> NDArray[np.float32]:
    """What each code of a scalar type stands for in units of its scale (2**bits,)."""
    return np.array(LAYOUTS[kind].levels, np.float32)


@cache
def grid(kind: str) -> NDArray[np.float32]:
    """The vectors of a vector type in units of its scale (2**index_bits, group), as ggml itself decodes them."""
    layout = LAYOUTS[kind]
    count = 1 << layout.index_bits
    per_block = layout.block // layout.group
    rows = count // per_block
    data = np.zeros((rows, ggml.row_bytes(kind, layout.block)), np.uint8)
    # the super-block's scale that makes the unit 1 where the small scales are 0
    data[:, layout.d : layout.d + 2] = np.array([1 / layout.unit(np.zeros(1, np.float32))[0]], np.float16).view(
        np.uint8
    )
    empty = unpack(kind, data.reshape(-1), rows, layout.block)
    packed = empty.pack(np.arange(count, dtype=np.uint32).reshape(rows, per_block))
    return ggml.decode(kind, packed, rows, layout.block).reshape(count, layout.group)


def _bits(layout: Layout, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy of the blocks' bits (blocks, 8 × bytes of a block)."""
    blocks = data.reshape(-1, ggml.row_bytes(layout.name, layout.block))
    return np.unpackbits(blocks, axis=1, bitorder="little")


def _odd_signs(layout: Layout, codes: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Whether the minus signs of each 8 weights are odd in number (blocks, block / 8)."""
    signs = np.bitwise_xor.reduce(codes.reshape(len(codes), -1, 8 // layout.group), axis=2)
    signs >>= np.uint32(layout.index_bits)
    for half in (4, 2, 1):
        signs ^= signs >> np.uint32(half)
    odd: NDArray[np.bool_] = (signs & 1).astype(np.bool_)
    return odd


def _scales(
    layout: Layout, bits: NDArray[np.uint8], data: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Scale and offset of each run of columns (blocks, block / run)."""

    def half(at: int) -> NDArray[np.float32]:
        return np.ascontiguousarray(data[:, at : at + 2]).view(np.float16).astype(np.float32)

    def number(places: NDArray[np.int64]) -> NDArray[np.float32]:
        weights = (1 << np.arange(len(places), dtype=np.uint32))[:, None]
        values: NDArray[np.float32] = (bits[:, places] * weights).sum(axis=1).astype(np.float32)
        return values

    scale = half(layout.d)
    if layout.scale is not None:
        scale = scale * layout.unit(number(layout.scale)).astype(np.float32)
    if layout.dmin is None:
        return scale, None
    if layout.minimum is None:
        return scale, -half(layout.dmin)
    return scale, half(layout.dmin) * number(layout.minimum)
