"""Numbers of bytes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficli.errors import UsageError
from efficli.ops.byte_size import binary_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("0", 0),
        ("350MiB", 350 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("1.5GiB", 3 * 2**29),
        ("2 kB", 2000),
        ("2KiB", 2048),
        ("3TB", 3 * 10**12),
        ("3TiB", 3 * 2**40),
        ("7B", 7),
        ("1gib", 2**30),
        (" .5mb ", 500_000),
        ("0.1KiB", 102),
        ("2.MB", 2_000_000),
    ],
)
def test_a_size_is_read(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "MB", "-1", "1e9", "4G", "4GB4", "1.2.3MB", "1,5GB", "nan", "inf", "0x10", "٣MB", "1 K", "9" * 5000]
)
def test_anything_else_is_quoted_and_a_hint_given(text):
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert caught.value.message == f"{text!r} is not a number of bytes"
    assert "350MiB" in caught.value.hint


@given(st.integers(0, 10**15), st.sampled_from(["", "B", "kB", "KiB", "MB", "MiB", "GB", "GiB", "TB", "TiB"]))
def test_a_whole_number_is_exact_in_any_case(number, unit):
    size = parse_bytes(f"1{unit}")
    assert size == (1024 if "i" in unit else 1000) ** "BKMGT".index((unit or "B")[0].upper())
    for written in (unit, unit.lower(), unit.upper()):
        assert parse_bytes(f"{number}{written}") == number * size


def test_sizes_in_units_of_1024():
    assert [binary_bytes(n) for n in (5, 2048, 5735710, 3 << 30)] == ["5 B", "2.00 KiB", "5.47 MiB", "3.00 GiB"]
    for count in (1, 1 << 10, 5 << 20, 7 << 30):
        assert parse_bytes(binary_bytes(count)) == count
