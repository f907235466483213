"""Killed, torn, failed or forgotten at every call: a store has the whole entry or none, and no strays after that."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults import preload

KILLS = [("kill", "none"), ("torn", "none"), ("loss", "none")]
FAILURES = [(mode, error) for error in ("ENOSPC", "EIO", "EROFS") for mode in ("once", "from")]


def sweep(writer: str = "keep", **plan: Any) -> dict[str, Any]:
    return preload.sweep(f"tests.store.sweep:{writer}", program="tests.store.sweep", **plan)


WHOLE = [pytest.param(previous, 1, marks=pytest.mark.slow) for previous in (False, True)]


@pytest.mark.parametrize(("previous", "every"), [(True, 2), *WHOLE])
def test_killed_at_every_call_an_entry_is_whole_or_absent(previous, every):
    table = sweep(previous=previous, faults=KILLS, every=every)
    assert table["corrupt"] == []
    assert table["calls"] >= 25
    assert sum(table["outcomes"].values()) == 3 * len(range(0, table["calls"], every))
    reached = {"absent", "new"} | ({"old"} if previous else set())
    for mode, _ in KILLS:
        assert {name.split(": ")[1] for name in table["outcomes"] if name.startswith(mode)} == reached


@pytest.mark.parametrize(("previous", "every"), [(True, 6), *WHOLE])
def test_every_call_fails_an_entry_is_whole_or_absent(previous, every):
    table = sweep(previous=previous, faults=FAILURES, every=every)
    assert table["corrupt"] == []
    assert sum(table["outcomes"].values()) == 6 * len(range(0, table["calls"], every))


def test_the_sweep_catches_a_store_that_writes_in_place():
    table = sweep("in_place", previous=False, faults=[("kill", "none")], every=3)
    assert any("neither old nor new" in line for line in table["corrupt"])
