"""One slab of a tensor: from the checkpoint's bytes to those of every file that wants it, and the checks on the way.

A slab is a run of whole rows. It is converted to float32 in blocks that stay in the processor's cache and encoded by
ggml, once per distinct type. What already has the wanted type is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficli.checkpoint import Checkpoint
from efficli.errors import CheckpointError, UnsupportedError
from efficli.export.gguf.layout import OutTensor
from efficli.export.gguf.types import TERNARY
from efficli.ops import ggml
from efficli.ops.scan import CLEAN, check, scan

BLOCK_WEIGHTS = 1 << 17
"""Weights converted at a time: 512 KiB of float32, which a core's second-level cache holds."""

TERNARY_ERROR = 5e-3
"""Largest relative error of weights that a ternary type holds exactly: the scale's rounding to float16 costs 6e-4."""

_SAME: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
_DTYPES = {dtype.name: name for name, dtype in _SAME.items()}


class UnfitError(ValueError):
    """A slab holds NaN, Inf or what float16 cannot hold; the writer looks up how many and where."""


@dataclass(frozen=True, slots=True)
class Target:
    """An encoding of a tensor: its type, the importance of its columns, whether weights must be ternary."""

    type: str
    imatrix: NDArray[np.float32] | None
    guard: bool


class Scratch:
    """Buffers of one thread, grown to what its tensors need and then reused."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[np.uint8]] = {}

    def bytes(self, name: str, nbytes: int) -> NDArray[np.uint8]:
        """An uninitialised buffer of `nbytes` bytes; the same memory at every call with this name."""
        array = self._arrays.get(name)
        if array is None or array.nbytes < nbytes:
            # the old one is dropped first: peak memory counts
            self._arrays.pop(name, None)
            array = self._arrays[name] = np.empty(nbytes, np.uint8)
        return array[:nbytes]

    def floats(self, name: str, rows: int, columns: int) -> NDArray[np.float32]:
        """The same as float32 (rows, columns)."""
        return self.bytes(name, rows * columns * 4).view(np.float32).reshape(rows, columns)


def encode_slab(
    tensor: OutTensor,
    raw: NDArray[Any],
    targets: Sequence[Target],
    scratch: Scratch,
    heed: Callable[[], None] = lambda: None,
) -> list[NDArray[np.uint8]]:
    """Encode raw rows (r, c): float32, float16, float64, or bfloat16 as uint16 bits -> bytes, one array per target.

    The result is valid until the thread's next slab. `heed` is called before every block (a second of work for the
    slowest types) and may raise to stop. UnfitError for NaN, Inf and what float16 cannot hold;
    UnsupportedError for weights that are not ternary where the target guards that.
    """
    if raw.dtype == np.float64:
        raw = raw.astype(np.float32)
    found = scan(raw, _DTYPES[raw.dtype.name])
    if found.nan or found.infinite:
        raise UnfitError
    rows, columns = raw.shape
    out: list[NDArray[np.uint8]] = []
    for position, target in enumerate(targets):
        if _SAME.get(target.type) == raw.dtype:
            out.append(raw.reshape(-1).view(np.uint8))
            continue
        if target.type == "F16" and found.overflow:
            raise UnfitError
        out.append(scratch.bytes(f"out{position}", rows * ggml.row_bytes(target.type, columns)))
    todo = [n for n, target in enumerate(targets) if _SAME.get(target.type) != raw.dtype]
    if todo:
        errors = _encode_blocks(raw, targets, todo, out, scratch, heed)
        for n, error in errors.items():
            if error > TERNARY_ERROR:
                raise _not_ternary(tensor, targets[n].type, error)
    for n in todo:
        # a block's scale is a float16: only huge weights can overflow it
        if found.overflow and not ggml.is_valid(targets[n].type, out[n]):
            message = f"{tensor.name}: its weights are too large for {targets[n].type}"
            raise CheckpointError(message, hint="use --type BF16, or clamp the weights")
    return out


def _encode_blocks(
    raw: NDArray[Any],
    targets: Sequence[Target],
    todo: list[int],
    out: list[NDArray[np.uint8]],
    scratch: Scratch,
    heed: Callable[[], None],
) -> dict[int, float]:
    """Fill `out` of the targets in `todo`, block by block; relative error of the guarded ones."""
    rows, columns = raw.shape
    step = max(1, BLOCK_WEIGHTS // columns)
    wrong = {n: 0.0 for n in todo if targets[n].guard}
    total = 0.0
    for start in range(0, rows, step):
        heed()
        block = _to_float(raw[start : start + step], scratch)
        for n in todo:
            target = targets[n]
            size = ggml.row_bytes(target.type, columns)
            place = out[n][start * size : (start + len(block)) * size]
            ggml.encode(target.type, block, place, target.imatrix)
            if target.guard:
                back = scratch.floats("back", len(block), columns)
                ggml.decode_into(target.type, place, back)
                np.subtract(back, block, out=back)
                wrong[n] += float(np.vdot(back, back))
        if wrong:
            total += float(np.vdot(block, block))
    return {n: (value / total) ** 0.5 if total else 0.0 for n, value in wrong.items()}


def _to_float(raw: NDArray[Any], scratch: Scratch) -> NDArray[np.float32]:
    """Rows as float32, in the thread's buffer unless they are already that."""
    if raw.dtype == np.float32:
        return np.ascontiguousarray(raw, np.float32)
    block = scratch.floats("block", *raw.shape)
    if raw.dtype == np.uint16:
        ggml.bf16_to_f32(np.ascontiguousarray(raw, np.uint16), block)
    elif raw.dtype == np.float16:
        ggml.f16_to_f32(np.ascontiguousarray(raw, np.float16), block)
    else:
        raise TypeError(f"weights cannot be {raw.dtype}")
    return block


def explain(ckpt: Checkpoint, sources: Sequence[str]) -> CheckpointError:
    """The error for NaN, Inf or too large values in any of these tensors: how many, and where the first one is."""
    for name in sources:
        tensor, found = ckpt.tensors[name], CLEAN
        columns = int(np.prod(tensor.shape[1:], dtype=np.int64))
        step = max(1, (1 << 20) // max(1, columns))
        for start in range(0, tensor.shape[0], step):
            raw = ckpt.read_rows(name, start, min(start + step, tensor.shape[0]))
            found += scan(raw, tensor.dtype, start * columns)
        try:
            check(name, tensor.shape, found, float16=True)
        except CheckpointError as error:
            return error
    return CheckpointError(f"NaN or Inf after transforming {', '.join(sources)}")


def _not_ternary(tensor: OutTensor, kind: str, error: float) -> UnsupportedError:
    what = "binary" if kind == "Q1_0" else "ternary"
    return UnsupportedError(
        f"{tensor.name}: its weights are not {what}: {kind} would keep them with a relative error of {error:.2g}, "
        f"expected at most {TERNARY_ERROR:g}",
        hint=f"{kind} packs weights that were trained {what}; take Q2_K or an IQ type, or say --allow-non-ternary",
    )


def target_of(kind: str, imatrix: NDArray[np.float32] | None, allow_non_ternary: bool) -> Target:
    """How a tensor is encoded to `kind`."""
    weights = None if imatrix is None else np.ascontiguousarray(imatrix, np.float32).reshape(-1)
    return Target(kind, weights, kind in TERNARY and not allow_non_ternary)
