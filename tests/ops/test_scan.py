"""The scan against numpy's own isnan and a conversion to float16, element by element."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficli.errors import CheckpointError
from efficli.ops.scan import CLEAN, check, scan
from tests.pico import to_bytes


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    return np.frombuffer(to_bytes(values, dtype), kind).reshape(values.shape)


def as_float(values: np.ndarray, dtype: str) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


@given(
    dtype=st.sampled_from(["BF16", "F16", "F32", "F64"]),
    bits=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=40),
    offset=st.integers(0, 9),
)
def test_counts_equal_numpys(dtype: str, bits: list[int], offset: int) -> None:
    kind = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]
    width = np.dtype(kind).itemsize
    raw = b"".join((b >> (64 - 8 * width)).to_bytes(width, "little") for b in bits)
    array = np.frombuffer(raw, kind)
    values = as_float(array, dtype)
    found = scan(array, dtype, offset)
    with np.errstate(over="ignore", invalid="ignore"):
        over = np.isfinite(values) & np.isinf(values.astype(np.float16))
    for count, first, mask in (
        (found.nan, found.first_nan, np.isnan(values)),
        (found.infinite, found.first_infinite, np.isinf(values)),
        (found.overflow, found.first_overflow, over),
    ):
        assert count == mask.sum()
        assert first == (np.argmax(mask) + offset if mask.any() else -1)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_edge_of_float16(dtype: str) -> None:
    # 65519.99 rounds down to 65504; bfloat16 has nothing between 65280 and 65536
    fits, over = (65280.0, 65536.0) if dtype == "BF16" else (65519.996, 65520.0)
    assert scan(stored(np.array([fits, -fits], np.float32), dtype), dtype) == CLEAN
    assert scan(stored(np.array([fits, -over], np.float32), dtype), dtype).first_overflow == 1


def test_parts_add_up_to_the_whole() -> None:
    values = np.random.default_rng(0).standard_normal((7, 30_000)).astype(np.float32)
    values[[1, 3, 3], [5, 0, 29_999]] = np.nan, np.inf, 7e4
    whole = scan(values, "F32")
    parts = CLEAN
    for row in reversed(range(7)):
        parts += scan(values[row], "F32", row * 30_000)
    assert parts == whole
    assert (whole.nan, whole.infinite, whole.overflow) == (1, 1, 1)


def test_messages() -> None:
    values = np.zeros((3, 4), np.float32)
    values[1, 2] = 7e4
    check("w", (3, 4), scan(values, "F32"))
    with pytest.raises(CheckpointError) as caught:
        check("w", (3, 4), scan(values, "F32"), float16=True)
    assert caught.value.line == "w: 1 value overflows float16 (first at [1,2])"
    values[2, 3] = -np.inf
    with pytest.raises(CheckpointError, match=r"^1 Inf in w \(first at \[2,3\]\)$"):
        check("w", (3, 4), scan(values, "F32"))
    values[0, 0] = values[0, 1] = np.nan
    with pytest.raises(CheckpointError, match=r"^2 NaN and 1 Inf in w \(first at \[0,0\]\)$"):
        check("w", (3, 4), scan(values, "F32"))


def test_about_a_nanosecond_per_weight() -> None:
    array = np.random.default_rng(0).integers(0, 0x4000, 1 << 24, dtype=np.uint16)
    start = time.process_time()
    assert scan(array, "BF16") == CLEAN
    assert (time.process_time() - start) / array.size < 1e-9
