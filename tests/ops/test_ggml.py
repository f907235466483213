"""ggml by ctypes: layout of its structures, types, encoder and decoder against independent definitions."""

import ctypes

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from efficli.errors import MissingExtra
from efficli.ops import ggml, libraries
from efficli.ops.ggml_types import BLOCKS

ALL = sorted(ggml.TYPE_IDS)
# their tables take seconds to build: 1, 3, 6 and 12
SLOW = {"IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M"}
DECODED = sorted(set(ALL) - SLOW - {"F32", "Q1_0", "Q2_0"})  # the package decodes neither Q1_0 nor Q2_0


def gaussian(rows: int = 3, columns: int = 512, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def encode(name: str, rows: np.ndarray, imatrix: np.ndarray | None = None) -> np.ndarray:
    out = np.empty(len(rows) * ggml.row_bytes(name, rows.shape[1]), np.uint8)
    if imatrix is None and name in ggml.NEEDS_IMATRIX:
        imatrix = np.ones(rows.shape[1], np.float32)
    assert ggml.encode(name, rows, out, imatrix) == out.nbytes
    return out


@pytest.mark.parametrize("name", ALL)
def test_sizes_are_those_of_the_gguf_package(name):
    known = {t.name: t for t in GGMLQuantizationType}
    info = ggml.type_info(name.lower())
    assert info.number == ggml.TYPE_IDS[name]
    assert ggml.type_name(info.number) == name
    assert BLOCKS[name] == (info.block_size, info.block_bytes)
    if name in known:
        assert known[name].value == info.number
        assert GGML_QUANT_SIZES[known[name]] == (info.block_size, info.block_bytes)
    assert ggml.row_bytes(name, 3 * info.block_size) == 3 * info.block_bytes
    if info.block_size > 1:
        with pytest.raises(ValueError, match="not a multiple"):
            ggml.row_bytes(name, info.block_size + 1)


def test_every_type_that_the_library_quantizes_is_known():
    names = [ggml._base().ggml_type_name(n) for n in range(43)]
    installed = {name.decode().upper() for n, name in enumerate(names) if name and ggml._base().ggml_blck_size(n)}
    assert installed - set(ALL) == {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}


@pytest.mark.parametrize("name", ALL)
def test_layout_of_the_traits_structure(name):
    """A field in the wrong place would read another's value: compare each with the function that tells it alone."""
    number = ggml.type_id(name)
    traits = ggml._base().ggml_get_type_traits(number).contents
    assert traits.type_name == ggml._base().ggml_type_name(number)
    assert traits.blck_size == ggml._base().ggml_blck_size(number)
    assert traits.type_size == ggml._base().ggml_type_size(number)
    assert traits.is_quantized == (name not in ("F32", "F16", "BF16"))
    # the structures lie in one array: their distance is their size
    first, second = (ctypes.addressof(ggml._base().ggml_get_type_traits(n).contents) for n in (0, 1))
    assert second - first == ctypes.sizeof(ggml.TypeTraits)


@pytest.mark.parametrize("name", [*DECODED, *(pytest.param(name, marks=pytest.mark.slow) for name in sorted(SLOW))])
def test_decoding_agrees_with_the_gguf_package(name):
    data = encode(name, gaussian())
    ours = ggml.decode(name, data, 3, 512)
    theirs = dequantize(data.reshape(3, -1), GGMLQuantizationType[name])
    np.testing.assert_allclose(ours, theirs, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4", "BF16", "F16"])
def test_encoding_equals_the_numpy_encoder_of_the_gguf_package(name):
    rows = gaussian(5)
    theirs = quantize(rows, GGMLQuantizationType[name]).view(np.uint8)
    assert np.array_equal(encode(name, rows), theirs.reshape(-1))


def test_q8_0_by_its_definition():
    """A block of 32: float16 scale max|w| / 127, then 32 signed bytes round(w / scale)."""
    row = gaussian(1, 32)
    data = encode("Q8_0", row)
    scale = np.abs(row).max() / np.float32(127)
    assert data[:2].view(np.float16)[0] == np.float16(scale)
    codes = data[2:].view(np.int8).astype(np.float32)
    assert np.abs(codes - row / scale).max() <= 0.5 + 1e-5


@pytest.mark.parametrize(("name", "levels"), [("TQ1_0", 3), ("TQ2_0", 3), ("Q2_0", 3), ("Q1_0", 2)])
def test_packing_types_are_exact_on_their_own_weights(name, levels):
    generator = np.random.default_rng(1)
    signs = generator.integers(-1, 2, (4, 512)) if levels == 3 else generator.choice([-1, 1], (4, 512))
    rows = (signs * np.float32(0.125)).astype(np.float32)
    assert np.array_equal(ggml.decode(name, encode(name, rows), 4, 512), rows)


def test_an_importance_matrix_moves_the_error_to_unimportant_columns():
    rows = gaussian(64)
    weights = np.ones(512, np.float32)
    weights[::2] = 1e3
    with_weights, without = (
        (ggml.decode("Q2_K", encode("Q2_K", rows, w), 64, 512) - rows) ** 2 for w in (weights, None)
    )
    assert with_weights[:, ::2].mean() < 0.9 * without[:, ::2].mean()


def test_float_conversions_are_exact_and_round_to_nearest_even():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    out = np.empty(1 << 16, np.float32)
    ggml.bf16_to_f32(bits, out)
    assert np.array_equal(out.view(np.uint32), bits.astype(np.uint32) << 16)
    ggml.f16_to_f32(bits.view(np.float16), out)
    expected = bits.view(np.float16).astype(np.float32)
    assert np.array_equal(out, expected, equal_nan=True)
    finite = expected[np.isfinite(expected)]
    # halfway between neighbours, and just beside
    spread = np.concatenate([finite, finite * np.float32(1 + 2**-11), finite * np.float32(1 + 2**-11 + 2**-20)])
    spread = spread[np.abs(spread) < 65504][None]
    assert np.array_equal(encode("F16", spread).view(np.float16), spread[0].astype(np.float16))
    big = gaussian(1, 1 << 14)
    rounded = (big.view(np.uint32) + 0x7FFF + ((big.view(np.uint32) >> 16) & 1)) >> 16
    assert np.array_equal(encode("BF16", big).view(np.uint16), rounded[0].astype(np.uint16))


def test_fast_and_plain_float16_agree(monkeypatch):
    rows = gaussian(7, 1001) * np.float32(3e4)
    fast = encode("F16", rows)
    monkeypatch.setattr(ggml, "_to_half", lambda: None)
    assert np.array_equal(encode("F16", rows), fast)


def test_validity_sees_scales_that_overflow():
    rows = gaussian()
    assert ggml.is_valid("Q4_0", encode("Q4_0", rows))
    assert not ggml.is_valid("Q4_0", encode("Q4_0", rows * np.float32(1e6)))


@pytest.mark.parametrize(
    ("rows", "out", "imatrix"),
    [
        (np.zeros((2, 256), np.float32), np.zeros(143, np.uint8), None),
        (np.zeros((2, 256), np.float64), np.zeros(288, np.uint8), None),
        (np.zeros((256, 2), np.float32).T, np.zeros(288, np.uint8), None),
        (np.zeros((2, 256), np.float32), np.zeros(288, np.uint8), np.zeros(255, np.float32)),
    ],
)
def test_what_c_would_overrun_is_refused(rows, out, imatrix):
    with pytest.raises(ValueError, match="contiguous"):
        ggml.encode("Q4_K", rows, out, imatrix)


def test_types_that_would_abort_without_an_importance_matrix_are_those_of_the_library():
    needing = {name for name in ALL if ggml._base().ggml_quantize_requires_imatrix(ggml.type_id(name))}
    assert needing == ggml.NEEDS_IMATRIX
    with pytest.raises(ValueError, match="importance matrix"):
        ggml.encode("IQ2_XS", np.zeros((1, 256), np.float32), np.zeros(74, np.uint8))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra) as raised:
        libraries.library_path("ggml-base")
    assert raised.value.hint == "pip install 'efficli[gguf]'"
