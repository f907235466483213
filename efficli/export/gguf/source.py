"""Rows of an output tensor, read from its sources and transformed, in bounded memory.

Rows are counted over all leading axes: a tensor (experts, rows, columns) has experts x rows of them, a vector has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint
from efficli.errors import UnsupportedError
from efficli.export.gguf.layout import OutTensor

Array = NDArray[Any]
_READ_BYTES = 1 << 24
_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}


def rows(ckpt: Checkpoint, tensor: OutTensor, start: int, stop: int) -> Array:
    """Rows [start, stop) of `tensor` -> (stop - start, columns), all transforms applied.

    The dtype is the source's (bfloat16 as uint16 bits) where only places change, float32 where values do (`add_one`,
    `constant`) or the source is float64. Reads what the rows need, a whole head for `permute`; `transpose` goes through
    all of the source, a few MiB at a time.
    """
    columns = tensor.shape[-1]
    if tensor.transform == "constant":
        values: Array = np.asarray(tensor.values, dtype=np.float32).reshape(-1, columns)
        return values[start:stop]
    dtype = _dtype(ckpt, tensor)
    if tensor.transform == "permute":
        return _permuted(ckpt, tensor, start, stop, dtype)
    if tensor.transform == "transpose":
        return _transposed(ckpt, tensor.sources[0], start, stop, dtype)
    if tensor.transform == "stack":
        return _stacked(ckpt, tensor, start, stop, dtype)
    if tensor.transform == "slice":
        return _sliced(ckpt, tensor, start, stop, dtype)
    data = _copied(ckpt, tensor.sources[0], start, stop, columns, dtype)
    if tensor.transform == "add_one":
        return to_float32(data) + np.float32(1.0)
    return data


def to_float32(data: Array) -> NDArray[np.float32]:
    """What `rows` returns, as float32; uint16 are bfloat16 bits."""
    if data.dtype == np.uint16:
        return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float32, copy=False)


def _dtype(ckpt: Checkpoint, tensor: OutTensor) -> np.dtype[Any]:
    """The dtype in which the tensor's rows come; UnsupportedError for one that holds no plain numbers."""
    stored = {ckpt.tensors[name].dtype for name in tensor.sources}
    for name in tensor.sources:
        dtype = ckpt.tensors[name].dtype
        if dtype not in _DTYPES and dtype != "F64":
            scales = " needs its scales (weight_scale_inv)" if dtype.startswith(("F8", "F4")) else " holds no weights"
            raise UnsupportedError(f"{name}: dtype {dtype}{scales}", hint="start from the checkpoint in bfloat16")
    only = stored.pop() if len(stored) == 1 else "F32"
    return _DTYPES.get(only, _DTYPES["F32"])


def _read(ckpt: Checkpoint, name: str, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    """Entries [start, stop) of the first axis, in `dtype`."""
    data: Array = ckpt.read_rows(name, start, stop)
    return data if data.dtype == dtype else to_float32(data)


def _copied(ckpt: Checkpoint, name: str, start: int, stop: int, columns: int, dtype: np.dtype[Any]) -> Array:
    """Rows of a source of any number of axes; zeros beyond its end."""
    shape = ckpt.tensors[name].shape
    if len(shape) == 1:
        return _read(ckpt, name, 0, columns, dtype).reshape(1, columns)[start:stop]
    group = int(np.prod(shape[1:-1], dtype=np.int64))  # rows in one entry of the first axis
    first, last = start // group, min(-(-stop // group), shape[0])
    if first >= last:
        return np.zeros((stop - start, columns), dtype=dtype)
    data = _read(ckpt, name, first, last, dtype).reshape(-1, columns)
    data = data[start - first * group : stop - first * group]
    missing = stop - start - len(data)
    return np.concatenate([data, np.zeros((missing, columns), dtype=dtype)]) if missing else data


def _permuted(ckpt: Checkpoint, tensor: OutTensor, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    """Row 2j of a head is its row j, row 2j + 1 its row j + head_dim / 2."""
    size = tensor.shape[0] // tensor.heads
    name = tensor.sources[0]
    vector = len(tensor.shape) == 1
    wanted = np.arange(tensor.shape[0]) if vector else np.arange(start, stop)
    head, place = np.divmod(wanted, size)
    source = head * size + (place % 2) * (size // 2) + place // 2
    first = int(wanted[0]) // size * size
    last = -(-(int(wanted[-1]) + 1) // size) * size
    data: Array = _read(ckpt, name, first, last, dtype)[source - first]
    return data.reshape(1, -1)[start:stop] if vector else data


def _transposed(ckpt: Checkpoint, name: str, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    """Columns [start, stop) of the source as rows."""
    length, width = ckpt.tensors[name].shape
    out = np.empty((stop - start, length), dtype=dtype)
    step = max(1, _READ_BYTES // (4 * width))
    for first in range(0, length, step):
        last = min(first + step, length)
        out[:, first:last] = _read(ckpt, name, first, last, dtype)[:, start:stop].T
    return out


def _stacked(ckpt: Checkpoint, tensor: OutTensor, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    """Rows of matrices one after the other."""
    parts = [_read(ckpt, tensor.sources[n], a, b, dtype) for n, a, b in _pieces(start, stop, tensor.shape[-2])]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _sliced(ckpt: Checkpoint, tensor: OutTensor, start: int, stop: int, dtype: np.dtype[Any]) -> Array:
    """Rows of the same part of each matrix of one source."""
    first = tensor.span[0]
    parts = [
        _read(ckpt, tensor.sources[0], n, n + 1, dtype)[0, first + a : first + b]
        for n, a, b in _pieces(start, stop, tensor.shape[-2])
    ]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _pieces(start: int, stop: int, group: int) -> Iterator[tuple[int, int, int]]:
    """(matrix, first row in it, last row in it) of the rows [start, stop) of matrices of `group` rows."""
    while start < stop:
        number, offset = divmod(start, group)
        last = min(group, offset + stop - start)
        yield number, offset, last
        start += last - offset
