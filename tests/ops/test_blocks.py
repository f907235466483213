"""ggml's blocks taken apart: against ggml's own decoder and the grids of the gguf package."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import _type_traits

from efficli.errors import UnsupportedError
from efficli.ops import ggml
from efficli.ops.block_layouts import LAYOUTS
from efficli.ops.blocks import SCALAR_TYPES, VECTOR_TYPES, grid, levels, unpack

ALL = (*SCALAR_TYPES, *VECTOR_TYPES)


def noise(kind: str, rows: int = 3, columns: int = 512, seed: int = 0) -> np.ndarray:
    """Blocks of random bits, every scale of them finite: anything that the type can hold."""
    rng = np.random.default_rng(seed)
    layout = LAYOUTS[kind]
    blocks = rng.integers(0, 256, (rows * columns // layout.block, ggml.row_bytes(kind, layout.block)), np.uint8)
    for at in (layout.d, layout.dmin):
        if at is not None:
            blocks[:, at : at + 2] = rng.standard_normal((len(blocks), 1)).astype(np.float16).view(np.uint8)
    return blocks.reshape(-1)


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


@pytest.mark.parametrize("kind", ALL)
def test_packing_what_was_unpacked_gives_the_same_bytes(kind):
    data = noise(kind)
    blocks = unpack(kind, data, 3, 512)
    assert np.array_equal(blocks.pack(blocks.codes), data)
    assert blocks.codes.shape == (3, 512 // blocks.layout.group)


@pytest.mark.parametrize("kind", ALL)
def test_ggml_decodes_what_was_packed_to_what_was_meant(kind):
    """With codes drawn anew from all that there are, bit for bit."""
    data = noise(kind)
    blocks = unpack(kind, data, 3, 512)
    codes = unpack(kind, noise(kind, seed=1), 3, 512).codes
    packed = blocks.pack(codes)
    assert np.array_equal(bits(blocks.decode(codes)), bits(ggml.decode(kind, packed, 3, 512)))
    again = unpack(kind, packed, 3, 512)
    assert np.array_equal(again.codes, codes)
    assert np.array_equal(again.scales, blocks.scales)


@pytest.mark.parametrize("kind", SCALAR_TYPES)
def test_every_code_of_every_place(kind):
    blocks = unpack(kind, noise(kind, rows=1), 1, 512)
    for code in range(len(levels(kind))):
        codes = np.full_like(blocks.codes, code)
        assert np.array_equal(bits(blocks.decode(codes)), bits(ggml.decode(kind, blocks.pack(codes), 1, 512)))


@pytest.mark.parametrize("kind", VECTOR_TYPES)
def test_grids_are_those_of_the_gguf_package(kind):
    known = _type_traits[GGMLQuantizationType[kind]]
    known.init_grid()
    assert np.array_equal(grid(kind), known.grid.reshape(grid(kind).shape))


@pytest.mark.parametrize("kind", ["Q4_K", "IQ4_XS", "Q8_0", "IQ3_S"])
def test_encoded_weights_survive(kind):
    rows = np.random.default_rng(2).standard_normal((4, 512)).astype(np.float32)
    rows[1] = 0
    data = np.empty(4 * ggml.row_bytes(kind, 512), np.uint8)
    ggml.encode(kind, rows, data)
    blocks = unpack(kind, data, 4, 512)
    assert np.array_equal(blocks.pack(blocks.codes), data)
    assert np.array_equal(bits(blocks.decode(blocks.codes)), bits(ggml.decode(kind, data, 4, 512)))


def test_some_rows_alone():
    data = noise("Q3_K", rows=5)
    blocks = unpack("Q3_K", data, 5, 512)
    some = blocks.part(1, 3)
    width = ggml.row_bytes("Q3_K", 512)
    assert np.array_equal(some.pack(some.codes), data[width : 3 * width])
    assert np.array_equal(some.decode(some.codes), blocks.decode(blocks.codes)[1:3])


def test_what_a_type_cannot_hold_is_refused():
    blocks = unpack("Q2_K", noise("Q2_K"), 3, 512)
    with pytest.raises(ValueError, match="2 bits, found 4"):
        blocks.pack(np.full_like(blocks.codes, 4))
    with pytest.raises(ValueError, match="shape"):
        blocks.pack(blocks.codes[:2])
    for kind in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS"):
        blocks = unpack(kind, noise(kind), 3, 512)
        odd = blocks.codes.copy()
        odd[1, 5] ^= 1 << blocks.layout.index_bits
        with pytest.raises(ValueError, match="even number"):
            blocks.pack(odd)
    with pytest.raises(UnsupportedError, match="TQ1_0"):
        unpack("TQ1_0", noise("Q2_K"), 1, 256)
