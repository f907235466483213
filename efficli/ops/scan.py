"""Count NaN, infinities and values too large for float16 in stored weights, at the speed of memory.

Without their sign bit, floats are ordered as their bits are: one integer maximum per block says whether anything in it
is wrong, and only such a block is looked at closely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.errors import CheckpointError

_BLOCK = 1 << 16
"""Elements looked at at once: the block and its copy stay in the second-level cache."""


@dataclass(frozen=True, slots=True)
class _Format:
    """A float format's bits: its unsigned type, the bits of infinity and of the least magnitude that float16 lacks."""

    unsigned: str
    infinity: int
    too_large: int


# float16 rounds from 65520 up to infinity; in bfloat16 the first value above it is 65536
_FORMATS = {
    "BF16": _Format("u2", 0x7F80, 0x4780),
    "F16": _Format("u2", 0x7C00, 0x7C00),
    "F32": _Format("u4", 0x7F800000, 0x477FF000),
    "F64": _Format("u8", 0x7FF0000000000000, 0x40EFFE0000000000),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Counts, and the flat index of the first of each kind (-1: none); findings of the parts of a tensor are added."""

    nan: int = 0
    infinite: int = 0
    overflow: int = 0
    """Finite values whose nearest float16 is infinite."""
    first_nan: int = -1
    first_infinite: int = -1
    first_overflow: int = -1

    def __add__(self, other: Finding) -> Finding:
        """The finding of both parts together."""
        return Finding(
            self.nan + other.nan,
            self.infinite + other.infinite,
            self.overflow + other.overflow,
            _least(self.first_nan, other.first_nan),
            _least(self.first_infinite, other.first_infinite),
            _least(self.first_overflow, other.first_overflow),
        )


CLEAN = Finding()


def scan(stored: NDArray[Any], dtype: str, offset: int = 0) -> Finding:
    """What is wrong with `stored`, floats of the safetensors `dtype` (BF16 as uint16 bits); any shape.

    `offset` is the flat index of its first element in the whole tensor. About 0.1 ns per weight where all is well.
    """
    form = _FORMATS[dtype]
    bits = np.ascontiguousarray(stored).reshape(-1).view(form.unsigned)
    buffer = np.empty(min(_BLOCK, bits.size), form.unsigned)
    found = CLEAN
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        # twice the bits: the sign falls off
        doubled = np.left_shift(block, 1, out=buffer[: block.size])
        if int(doubled.max()) >= 2 * form.too_large:
            found += _look(doubled, form, offset + start)
    return found


def check(name: str, shape: tuple[int, ...], found: Finding, *, float16: bool = False) -> None:
    """Error if a tensor has NaN or infinite values, or, with `float16`, values that float16 cannot hold."""
    if found.nan or found.infinite:
        counted = " and ".join(f"{n} {what}" for n, what in ((found.nan, "NaN"), (found.infinite, "Inf")) if n)
        first = _index(_least(found.first_nan, found.first_infinite), shape)
        hint = "the checkpoint is damaged, or its training diverged"
        raise CheckpointError(f"{counted} in {name} (first at {first})", hint=hint)
    if float16 and found.overflow:
        values = "value overflows" if found.overflow == 1 else "values overflow"
        message = f"{found.overflow} {values} float16 (first at {_index(found.first_overflow, shape)})"
        raise CheckpointError(message, where=name, hint="use --type BF16, or clamp the weights")


def _look(doubled: NDArray[Any], form: _Format, offset: int) -> Finding:
    """The finding of one block that has something to find; `doubled` are its bits times two."""
    nan = doubled > 2 * form.infinity
    infinite = doubled == 2 * form.infinity
    overflow = (doubled >= 2 * form.too_large) & ~nan & ~infinite
    firsts = [int(np.argmax(kind)) + offset if kind.any() else -1 for kind in (nan, infinite, overflow)]
    return Finding(int(nan.sum()), int(infinite.sum()), int(overflow.sum()), *firsts)


def _least(a: int, b: int) -> int:
    return max(a, b) if a < 0 or b < 0 else min(a, b)


def _index(flat: int, shape: tuple[int, ...]) -> str:
    """`[row,column]` of a flat index."""
    return f"[{','.join(str(int(i)) for i in np.unravel_index(flat, shape))}]" if shape else "[]"
