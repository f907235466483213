"""Where the bits of ggml's blocks lie: the codes of the weights and the scales, for each type that is taken apart.

Source: ggml-common.h (struct block_*) and dequantize_row_* of ggml-quants.c, llama.cpp of ggml 0.25. A place is
8 × byte + bit. Not here: types of 1 bit, ternary ones and the 4-bit floating-point ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
"""(bits, numbers): the place of each bit, lowest first, of each number of a block; -1 where it is not stored."""

_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _plain(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One type's block of `block` weights; `group` of them share a code, `run` of them a scale."""

    name: str
    block: int
    run: int
    group: int = 1
    codes: Places
    """Bits of the codes (bits, block / group); of vector types the index first, then the signs."""
    levels: tuple[float, ...] = ()
    """Scalar types: what each code stands for, in units of the scale."""
    index_bits: int = 0
    """Vector types: bits of the index into the grid."""
    parity: bool = False
    """Whether the last sign of 8 weights is not stored but makes the number of minus signs even."""
    d: int = 0
    """Byte of the block's scale, a float16."""
    scale: Places | None = None
    """Bits of the runs' own scales (bits, block / run)."""
    unit: Callable[[NDArray[np.float32]], NDArray[np.float32]] = _plain
    """From a run's scale as stored to its factor on the block's."""
    dmin: int | None = None
    """Byte of the scale of the offsets, a float16; without `minimum` a number to add."""
    minimum: Places | None = None
    """Bits of the runs' offsets, which are subtracted (bits, block / run)."""

    @property
    def unit_columns(self) -> int:
        """Columns whose codes depend on each other: a group, or the 8 with a sign that is not stored."""
        return 8 if self.parity else self.group

    @property
    def code_bits(self) -> int:
        """Bits of a code."""
        return len(self.codes)


def _places(*lowest: tuple[Sequence[int] | NDArray[np.int64], int]) -> Places:
    """Numbers made of parts, each (place of its lowest bit for every number, bits), lowest part first."""
    parts = [np.asarray(place)[None, :] + np.arange(bits)[:, None] for place, bits in lowest]
    return np.concatenate(parts).astype(np.int64)


def _nibbles(byte: int) -> NDArray[np.int64]:
    """32 weights in 16 bytes: the first 16 in the low halves."""
    e = np.arange(32)
    return 8 * (byte + e % 16) + 4 * (e // 16)


def _crumbs(byte: int) -> NDArray[np.int64]:
    """256 weights of 2 bits: 32 bytes hold 128 of them, 32 neighbours at the same shift."""
    e = np.arange(256)
    return 8 * (byte + 32 * (e // 128) + e % 32) + 2 * (e % 128 // 32)


def _halves(byte: int) -> NDArray[np.int64]:
    """256 weights of 4 bits: 32 bytes hold 64 of them, the first 32 in the low halves."""
    e = np.arange(256)
    return 8 * (byte + 32 * (e // 64) + e % 32) + 4 * (e % 64 // 32)


def _upper_bits(byte: int) -> NDArray[np.int64]:
    """256 weights of 1 bit in 32 bytes: 32 neighbours at the same shift."""
    e = np.arange(256)
    return 8 * (byte + e % 32) + e // 32


def _counted(start: int, bits: int) -> tuple[float, ...]:
    return tuple(float(n) for n in range(start, start + (1 << bits)))


def _k_scales(byte: int) -> tuple[Places, Places]:
    """The 8 scales and 8 offsets of 6 bits in the 12 bytes of Q4_K and Q5_K (get_scale_min_k4)."""
    low, high = np.arange(4), np.arange(4, 8)
    at = 8 * byte
    scale = np.hstack([_places((at + 8 * low, 6)), _places((at + 8 * (high + 4), 4), (at + 8 * (high - 4) + 6, 2))])
    least = np.hstack([_places((at + 8 * (low + 4), 6)), _places((at + 8 * (high + 4) + 4, 4), (at + 8 * high + 6, 2))])
    return scale, least


def _less_32(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return scales - 32


def _signed_byte(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return scales - 256 * (scales > 127)


def _quarter(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return (scales + np.float32(0.5)) * np.float32(0.25)


def _half(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return (scales + np.float32(0.5)) * np.float32(0.5)


def _odd(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return 1 + 2 * scales


def _small() -> list[Layout]:
    """Types of 32 weights with one scale."""
    bit = np.arange(32)
    signed = tuple(float(n if n < 128 else n - 256) for n in range(256))
    return [
        Layout(name="Q4_0", block=32, run=32, codes=_places((_nibbles(2), 4)), levels=_counted(-8, 4)),
        Layout(name="Q4_1", block=32, run=32, codes=_places((_nibbles(4), 4)), levels=_counted(0, 4), dmin=2),
        Layout(name="Q5_0", block=32, run=32, codes=_places((_nibbles(6), 4), (16 + bit, 1)), levels=_counted(-16, 5)),
        Layout(
            name="Q5_1", block=32, run=32, codes=_places((_nibbles(8), 4), (32 + bit, 1)), levels=_counted(0, 5), dmin=2
        ),
        Layout(name="Q8_0", block=32, run=32, codes=_places((8 * (2 + bit), 8)), levels=signed),
        Layout(name="IQ4_NL", block=32, run=32, codes=_places((_nibbles(2), 4)), levels=_IQ4_LEVELS),
    ]


def _large() -> list[Layout]:
    """Types of 256 weights, a code for each."""
    e, runs, eight = np.arange(256), np.arange(16), np.arange(8)
    scale, least = _k_scales(4)
    q4 = Layout(name="Q4_K", block=256, run=32, codes=_places((_halves(16), 4)), levels=_counted(0, 4))
    q4 = replace(q4, scale=scale, dmin=2, minimum=least)
    q5 = replace(q4, name="Q5_K", codes=_places((_halves(48), 4), (_upper_bits(16), 1)), levels=_counted(0, 5))

    q2 = Layout(name="Q2_K", block=256, run=16, codes=_places((_crumbs(16), 2)), levels=_counted(0, 2), d=80)
    q2 = replace(q2, scale=_places((8 * runs, 4)), dmin=82, minimum=_places((8 * runs + 4, 4)))

    q3_codes = _places((_crumbs(32), 2), (_upper_bits(0), 1))
    q3_low = np.where(runs < 8, 8 * (96 + runs), 8 * (88 + runs) + 4)
    q3_scale = _places((q3_low, 4), (8 * (104 + runs % 4) + 2 * (runs // 4), 2))
    q3 = Layout(name="Q3_K", block=256, run=16, codes=q3_codes, levels=_counted(-4, 3), d=108)
    q3 = replace(q3, scale=q3_scale, unit=_less_32)

    q6_low = 8 * (64 * (e // 128) + 32 * (e // 32 % 2) + e % 32) + 4 * (e % 128 // 64)
    q6 = Layout(name="Q6_K", block=256, run=16, codes=_places((q6_low, 4), (_crumbs(128), 2)), levels=_counted(-32, 6))
    q6 = replace(q6, d=208, scale=_places((8 * (192 + runs), 8)), unit=_signed_byte)

    iq4_codes = _places((8 * (8 + 16 * (e // 32) + e % 16) + 4 * (e % 32 // 16), 4))
    iq4 = Layout(name="IQ4_XS", block=256, run=32, codes=iq4_codes, levels=_IQ4_LEVELS)
    iq4 = replace(iq4, scale=_places((32 + 4 * eight, 4), (16 + 2 * eight, 2)), unit=_less_32)
    return [q2, q3, q4, q5, q6, iq4]


def _implied(codes: Places, groups: int) -> Places:
    """The last sign of every `groups` groups is not stored."""
    codes[-1, groups - 1 :: groups] = -1
    return codes


def _vectors() -> list[Layout]:
    """Types of 256 weights with a code for each 4 or 8 of them."""
    eights, fours, runs, eight = np.arange(32), np.arange(64), np.arange(16), np.arange(8)

    xxs_at = 8 * (2 + 8 * (eights // 4))
    xxs_codes = _implied(_places((xxs_at + 8 * (eights % 4), 8), (xxs_at + 32 + 7 * (eights % 4), 8)), 1)
    xxs = Layout(name="IQ2_XXS", block=256, group=8, run=32, codes=xxs_codes, index_bits=8, parity=True)
    xxs = replace(xxs, scale=_places((8 * (2 + 8 * eight + 7) + 4, 4)), unit=_quarter)

    xs_codes = _implied(_places((8 * (2 + 2 * eights), 9), (8 * (2 + 2 * eights) + 9, 8)), 1)
    xs = replace(xxs, name="IQ2_XS", run=16, codes=xs_codes, index_bits=9, scale=_places((8 * 66 + 4 * runs, 4)))

    s_codes = _places((8 * (2 + eights), 8), (8 * 66 + 2 * eights, 2), (8 * (34 + eights), 8))
    s = replace(xs, name="IQ2_S", codes=s_codes, index_bits=10, parity=False, scale=_places((8 * 74 + 4 * runs, 4)))

    # two groups of 4 share 7 sign bits: 4 of the first, 3 of the second
    three_signs = 8 * (66 + 4 * (fours // 8)) + 7 * (fours % 8 // 2) + 4 * (fours % 2)
    three_codes = _implied(_places((8 * (2 + fours), 8), (three_signs, 4)), 2)
    three = Layout(name="IQ3_XXS", block=256, group=4, run=32, codes=three_codes, index_bits=8, parity=True)
    three = replace(three, scale=_places((8 * (66 + 4 * eight + 3) + 4, 4)), unit=_half)

    three_s_codes = _places((8 * (2 + fours), 8), (8 * 66 + fours, 1), (8 * 74 + 4 * fours, 4))
    three_s = replace(three, name="IQ3_S", codes=three_s_codes, index_bits=9, parity=False)
    three_s = replace(three_s, scale=_places((8 * 106 + 4 * eight, 4)), unit=_odd)
    return [xxs, xs, s, three, three_s]


LAYOUTS: Mapping[str, Layout] = MappingProxyType({one.name: one for one in (*_small(), *_large(), *_vectors())})
"""The types that can be taken apart."""
