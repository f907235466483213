"""What a GGUF file consists of before a byte is written: typed metadata and output tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gguf import GGUFValueType

Transform = Literal["copy", "permute", "add_one", "transpose", "stack", "slice", "constant"]
"""How sources become an output tensor.

copy: the source as it is, possibly cut or zero-padded to `shape[0]` rows. permute: rows of each head from half-split to
interleaved rotary order. add_one: w + 1 (Gemma norms). transpose: (in, out) -> (out, in) (GPT-2 Conv1D). stack: sources
(rows, cols) stacked to (n, rows, cols) (experts). slice: rows `span` of the middle axis of one source (n, rows, cols)
(experts with gate and up together). constant: `values`, no source.
"""


@dataclass(frozen=True, slots=True)
class Field:
    """One metadata value with its GGUF type; arrays have an `item` type."""

    value: Any
    type: GGUFValueType
    item: GGUFValueType | None = None


Metadata = dict[str, Field]


def u32(value: int) -> Field:
    """An unsigned 32-bit integer."""
    return Field(int(value), GGUFValueType.UINT32)


def f32(value: float) -> Field:
    """A 32-bit float."""
    return Field(float(value), GGUFValueType.FLOAT32)


def boolean(value: bool) -> Field:
    """A boolean."""
    return Field(bool(value), GGUFValueType.BOOL)


def string(value: str) -> Field:
    """A UTF-8 string."""
    return Field(str(value), GGUFValueType.STRING)


def array(values: Sequence[Any], item: GGUFValueType) -> Field:
    """An array whose items all have the type `item`."""
    return Field(list(values), GGUFValueType.ARRAY, item)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutTensor:
    """One tensor of the file: `shape` in numpy order (rows, cols), built from `sources` by `transform`."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transform: Transform = "copy"
    heads: int = 0
    """Number of heads, for `permute`."""
    span: tuple[int, int] = (0, 0)
    """First and last (exclusive) row of each expert, for `slice`."""
    values: tuple[float, ...] = ()
    """The data, for `constant`."""
    keep_f32: bool = False
    """Stays F32 in every file: vectors, norms, routers, position tables."""

    @property
    def num_elements(self) -> int:
        """Number of weights."""
        count = 1
        for n in self.shape:
            count *= n
        return count
