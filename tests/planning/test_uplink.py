"""Passes and days, against the published table of links (targets: VHF to S-band) and by counting passes."""

from __future__ import annotations

import pytest

from efficli.errors import UsageError
from efficli.planning.uplink import Uplink, make_uplink, parse_pass, parse_rate
from efficli.target import load_target


@pytest.mark.parametrize(("rate", "efficiency", "kb_per_s", "per_pass", "per_day"), [
    ("1.2kbps", 0.6, 0.09, 43e3, 0.17e6),
    ("9.6kbps", 0.6, 0.72, 0.35e6, 1.4e6),
    ("64kbps", 0.7, 5.6, 2.7e6, 10.8e6),
    ("256kbps", 0.7, 22, 10.8e6, 43e6),
    ("1Mbps", 0.7, 87, 42e6, 168e6),
])  # fmt: skip
def test_the_table_of_links(rate: str, efficiency: float, kb_per_s: float, per_pass: float, per_day: float) -> None:
    link = Uplink(bits_per_s=parse_rate(rate), efficiency=efficiency)
    assert link.bytes_per_s / 1e3 == pytest.approx(kb_per_s, rel=0.02)
    assert link.bytes_per_pass == pytest.approx(per_pass, rel=0.02)
    assert link.bytes_per_pass * link.passes_per_day == pytest.approx(per_day, rel=0.02)


def test_what_fits_of_that_table() -> None:
    assert Uplink(bits_per_s=256e3).transfer(100_000_000).days == 2.5
    assert Uplink(bits_per_s=1e6).transfer(800_000_000).days == 5
    assert Uplink(bits_per_s=9.6e3, efficiency=0.6).transfer(250_000).passes == 1


def test_passes_are_whole_and_three_are_the_budget() -> None:
    link = Uplink(bits_per_s=8000, pass_s=100, passes_per_day=2, efficiency=0.5)
    assert link.bytes_per_pass == 50_000
    for nbytes in (1, 49_999, 50_000, 50_001, 150_000, 150_001):
        left, passes = nbytes, 0
        while left > 0:
            left, passes = left - 50_000, passes + 1
        found = link.transfer(nbytes)
        assert (found.passes, found.days, found.in_budget) == (passes, passes / 2, passes <= 3)
    assert link.to_json()["bytes_in_3_passes"] == 150_000
    assert link.transfer(150_001).to_json() == {"passes": 4, "days": 2.0, "within_3_passes": False}


@pytest.mark.parametrize(("text", "bits"), [
    ("9.6kbps", 9600), ("256kbps", 256e3), (" 256 kbit/s ", 256e3), ("1Mbps", 1e6), ("1200bps", 1200), (".5Gb/s", 5e8),
    ("64kbits/s", 64e3),
])  # fmt: skip
def test_rates(text: str, bits: float) -> None:
    assert parse_rate(text) == pytest.approx(bits)


@pytest.mark.parametrize(
    "text", ["", "256", "256k", "32kB/s", "32KBps", "-1kbps", "0kbps", "1e3kbps", "nan kbps", "٣kbps"]
)
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(UsageError, match="is not a rate in bits"):
        parse_rate(text)


def test_what_is_left_out_is_the_targets_or_the_usual() -> None:
    assert make_uplink(None) is None
    assert make_uplink(None, rate=1e3) == Uplink(bits_per_s=1e3, pass_s=480, passes_per_day=4, efficiency=0.7)
    tx2i = load_target("jetson-tx2i").link
    assert make_uplink(tx2i) == Uplink(bits_per_s=9600, pass_s=480, passes_per_day=4, efficiency=0.6)
    asked = make_uplink(tx2i, rate=64e3, pass_s=parse_pass("5min"), passes_per_day=2)
    assert asked == Uplink(bits_per_s=64e3, pass_s=300, passes_per_day=2, efficiency=0.6)
    with pytest.raises(UsageError, match="--pass 0, expected more than 0"):
        make_uplink(None, rate=1e3, pass_s=parse_pass("0s"))
    with pytest.raises(UsageError, match="--passes-per-day nan"):
        make_uplink(tx2i, passes_per_day=float("nan"))
