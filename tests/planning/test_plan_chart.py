"""The plan as a picture: what is in it, where the limits are, and that names do not cover each other."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest

from efficli.errors import OutputError, UsageError
from efficli.planning.plan import plan
from efficli.planning.plan_chart import chart_lines, check, draw, spread

MIB = 1 << 20


def test_a_png_of_several_devices(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    draw(plan("reference", targets=("pi5-8gb", "pi-zero-2w", "gr740")), path)
    image = path.read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", image[16:24]) == (1200, 810)
    assert [one.name for one in tmp_path.iterdir()] == ["plan.png"]
    draw(plan("reference", targets=("pi5-8gb", "pi-zero-2w", "gr740")), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == image


def test_the_limit_is_the_largest_file_that_fits(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "like: pi-zero-2w\nabout: mine\nversion: 1\nram:\n"
        "  total_mib: {value: 64, source: made up, confidence: vendor}\n"
        "  usable_mib: {value: 36, source: made up, confidence: vendor}\n"
    )
    result = plan("reference", targets=(str(mine),), all_types=True)
    (line,) = chart_lines(result)
    for one in line.fits:
        assert (one.verdict == "FIT") == (one.file_bytes / MIB <= line.room), one.type
    assert {one.verdict for one in line.fits} == {"FIT", "TIGHT", "NO"}


def test_devices_without_a_speed_are_not_drawn(tmp_path: Path) -> None:
    result = plan("reference", targets=("gr740", "pic64-hpsc"))
    assert chart_lines(result) == []
    with pytest.raises(UsageError, match="no device has a speed that is known"):
        draw(result, tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_said_before_anything_is_planned(tmp_path: Path) -> None:
    there = tmp_path / "there.png"
    there.write_bytes(b"mine")
    check(there, True, targets=True)
    with pytest.raises(OutputError, match="exists"):
        check(there, False, targets=True)
    with pytest.raises(OutputError, match="no such directory"):
        check(tmp_path / "no" / "a.png", False, targets=True)
    with pytest.raises(OutputError, match="is a directory"):
        (tmp_path / "folder.png").mkdir()
        check(tmp_path / "folder.png", True, targets=True)
    with pytest.raises(UsageError, match=r"ends in \.png"):
        check(tmp_path / "a.svg", False, targets=True)
    with pytest.raises(UsageError, match="expected --target"):
        check(tmp_path / "a.png", False, targets=False)


@pytest.mark.parametrize("wanted", [[5.0], [0, 0, 0], [0, 1, 50, 51, 52, 100], [*range(10)], [99, 99.5, 100]])
def test_names_are_moved_apart_and_keep_their_order(wanted: list[float]) -> None:
    places = spread(wanted, 10, 0, 100)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(places))
    assert 0 <= places[0] <= places[-1] <= 100
    assert spread([0, 30, 60], 10, 0, 100) == [0, 30, 60]
