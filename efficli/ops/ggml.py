"""ggml's tensor types, encoder and decoder: the C functions that llama.cpp itself uses, by ctypes.

Source: ggml.h, ggml-cpu.h and ggml-quants.h of llama-cpp-python 0.3.36 (ggml 0.25). Rows are float32 arrays
(rows, columns), C-contiguous; encoded rows are bytes, `row_bytes` each. Every call drops the GIL, so threads encode
side by side. The library is loaded from the installed package without importing it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from efficli.errors import UnsupportedError
from efficli.ops.ggml_types import TYPE_IDS
from efficli.ops.libraries import library_path

NEEDS_IMATRIX = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})
"""Types whose encoder aborts the process without an importance matrix."""

_NAMES = {number: name for name, number in TYPE_IDS.items()}
_POINTER = ctypes.c_void_p


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, _POINTER, _POINTER, ctypes.c_int64)),
        ("from_float_ref", _POINTER),
    )


@dataclass(frozen=True, slots=True)
class TypeInfo:
    """One type as the installed library knows it: `block_size` weights take `block_bytes` bytes."""

    name: str
    number: int
    block_size: int
    block_bytes: int


@cache
def _base() -> ctypes.CDLL:
    """libggml-base with its prototypes; UnsupportedError when its structures are not those known here."""
    library = ctypes.CDLL(str(library_path("ggml-base")))
    size, integer, number = ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
    prototypes = {
        "ggml_type_name": (ctypes.c_char_p, [number]),
        "ggml_blck_size": (integer, [number]),
        "ggml_type_size": (size, [number]),
        "ggml_get_type_traits": (ctypes.POINTER(TypeTraits), [number]),
        "ggml_quantize_init": (None, [number]),
        "ggml_quantize_requires_imatrix": (ctypes.c_bool, [number]),
        "ggml_quantize_chunk": (size, [number, _POINTER, _POINTER, integer, integer, integer, _POINTER]),
        "ggml_validate_row_data": (ctypes.c_bool, [number, _POINTER, size]),
        "ggml_bf16_to_fp32_row": (None, [_POINTER, _POINTER, integer]),
        "ggml_fp16_to_fp32_row": (None, [_POINTER, _POINTER, integer]),
        "ggml_fp32_to_fp16_row": (None, [_POINTER, _POINTER, integer]),
        "ggml_fp32_to_bf16_row_ref": (None, [_POINTER, _POINTER, integer]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, name, None)
        if function is None:
            raise UnsupportedError(f"the installed ggml has no function {name}", hint="pip install 'efficli[gguf]'")
        function.restype, function.argtypes = result, arguments
    traits = library.ggml_get_type_traits(TYPE_IDS["Q4_K"]).contents
    if (traits.type_name, traits.blck_size, traits.type_size) != (b"q4_K", 256, 144):
        raise UnsupportedError("the installed ggml has another layout of its types", hint="pip install 'efficli[gguf]'")
    return library


@cache
def _to_half() -> ctypes.CDLL | None:
    """libggml-cpu, whose vector float32 -> float16 rounds as ggml-base's scalar one does, 20 times faster; or None."""
    try:
        library = ctypes.CDLL(str(library_path("ggml-cpu")))
        library.ggml_cpu_fp32_to_fp16.restype = None
        library.ggml_cpu_fp32_to_fp16.argtypes = [_POINTER, _POINTER, ctypes.c_int64]
    except (OSError, AttributeError, UnsupportedError):
        # builds with back ends as plug-ins have no single library of this name
        return None
    return library


@cache
def type_info(name: str) -> TypeInfo:
    """What the installed library says about the type `name` ("Q4_K", any case); UnsupportedError if it has none."""
    number = type_id(name)
    told = _base().ggml_type_name(number)
    if told is None or told.decode().upper() != name.upper():
        raise UnsupportedError(f"the installed ggml has no type {name.upper()}", hint="pip install -U 'efficli[gguf]'")
    return TypeInfo(name.upper(), number, _base().ggml_blck_size(number), _base().ggml_type_size(number))


def type_id(name: str) -> int:
    """The number of a type in a GGUF file; KeyError for a name that is no type."""
    return TYPE_IDS[name.upper()]


def type_name(number: int) -> str:
    """The upper-case name of the type `number`; KeyError if it is none that weights are stored in."""
    return _NAMES[number]


def block_size(name: str) -> int:
    """How many weights of a row share a block; rows are a multiple of it."""
    return type_info(name).block_size


def row_bytes(name: str, columns: int) -> int:
    """Bytes of one encoded row of `columns` weights; ValueError if they do not fill whole blocks."""
    info = type_info(name)
    blocks, rest = divmod(columns, info.block_size)
    if rest:
        raise ValueError(f"{columns} columns are not a multiple of {info.block_size}, the block of {info.name}")
    return blocks * info.block_bytes


def prepare(name: str) -> None:
    """Build the tables that the encoder of this type needs; once, before threads start."""
    _base().ggml_quantize_init(type_id(name))


def encode(
    name: str,
    rows: NDArray[np.float32],
    out: NDArray[np.uint8],
    imatrix: NDArray[np.float32] | None = None,
) -> int:
    """Encode rows (r, c) into `out` (bytes, at least r × row_bytes) as llama.cpp's quantizer does; the bytes written.

    `imatrix` (c,) is the mean square of each column's input. F16 rounds to nearest even; overflow gives infinity.
    """
    count, columns = rows.shape
    needed: int = count * row_bytes(name, columns)
    _check(rows, np.float32, rows.size)
    _check(out, np.uint8, needed)
    if imatrix is not None:
        _check(imatrix, np.float32, columns)
    elif name.upper() in NEEDS_IMATRIX:
        raise ValueError(f"{name} cannot be encoded without an importance matrix")
    half = _to_half() if name.upper() == "F16" else None
    if half is not None:
        half.ggml_cpu_fp32_to_fp16(rows.ctypes.data, out.ctypes.data, rows.size)
        return needed
    weights = None if imatrix is None else imatrix.ctypes.data
    function = _base().ggml_quantize_chunk
    return int(function(type_id(name), rows.ctypes.data, out.ctypes.data, 0, count, columns, weights))


def decode(name: str, data: NDArray[np.uint8], rows: int, columns: int) -> NDArray[np.float32]:
    """Decode `rows` encoded rows of `columns` weights -> float32 (rows, columns)."""
    out = np.empty((rows, columns), np.float32)
    decode_into(name, data, out)
    return out


def decode_into(name: str, data: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Decode the bytes of out.shape[0] rows into `out` (rows, columns)."""
    rows, columns = out.shape
    needed = rows * row_bytes(name, columns)
    _check(data, np.uint8, needed)
    _check(out, np.float32, out.size)
    if name.upper() == "F32":
        out.reshape(-1)[:] = data[:needed].view(np.float32)
        return
    traits = _base().ggml_get_type_traits(type_id(name)).contents
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)


def is_valid(name: str, data: NDArray[np.uint8]) -> bool:
    """Whether encoded data holds no NaN or Inf (scales included), by llama.cpp's own check."""
    return bool(_base().ggml_validate_row_data(type_id(name), data.ctypes.data, data.nbytes))


def bf16_to_f32(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """bfloat16 bits -> float32, exact."""
    _check(bits, np.uint16, bits.size)
    _check(out, np.float32, bits.size)
    _base().ggml_bf16_to_fp32_row(bits.ctypes.data, out.ctypes.data, bits.size)


def f16_to_f32(values: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """float16 -> float32, exact."""
    _check(values, np.float16, values.size)
    _check(out, np.float32, values.size)
    _base().ggml_fp16_to_fp32_row(values.ctypes.data, out.ctypes.data, values.size)


def _check(array: NDArray[np.generic], dtype: type, at_least: int) -> None:
    """Refuse what C would read or write past its end."""
    if array.dtype != dtype or not array.flags.c_contiguous or array.size < at_least:
        raise ValueError(f"needs {at_least} contiguous {np.dtype(dtype)} values, has {array.size} {array.dtype}")
