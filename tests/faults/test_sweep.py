"""Killed, torn, failed or forgotten at every call: OUT is old, new or absent, and one line says so."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path

import pytest

from tests.faults import writers
from tests.faults.preload import sweep
from tests.faults.process import run, start
from tests.lost_nothing import fingerprint

KILLS = [("kill", "none"), ("torn", "none"), ("loss", "none")]
FAILURES = [(mode, error) for error in ("ENOSPC", "EIO", "EROFS") for mode in ("once", "from")]


# Rows 46, 47, 53: every call that changes a file is killed, torn, failed, or forgotten by the disk


@pytest.mark.parametrize("previous", [False, True])
def test_killed_at_every_call_nothing_is_corrupt(previous):
    table = sweep("toy", previous=previous, faults=KILLS)
    assert table["corrupt"] == []
    assert table["calls"] >= 30
    assert sum(table["outcomes"].values()) == 3 * table["calls"]
    kept = "old" if previous else "absent"
    for mode, _ in KILLS:
        # both sides of the commit were reached, and there is no third state
        assert {name.split(": ")[1] for name in table["outcomes"] if name.startswith(mode)} == {kept, "new"}


@pytest.mark.parametrize("previous", [pytest.param(False, marks=pytest.mark.slow), True])
def test_every_call_fails_nothing_is_corrupt(previous):
    table = sweep("toy", previous=previous, faults=FAILURES)
    assert table["corrupt"] == []
    assert sum(table["outcomes"].values()) == 6 * table["calls"]


@pytest.mark.slow
def test_a_file_system_without_exchange():
    """The old artifact may wait aside for the next run, which puts it back: never lost, never mixed."""
    table = sweep("toy", previous=True, no_exchange=True, faults=[*KILLS, *FAILURES])
    assert table["corrupt"] == []
    assert table["trace"].count("rename") == 2
    assert table["outcomes"]["kill none: absent"] == 1


@pytest.mark.parametrize(
    ("writer", "mode"),
    [("naive", "kill"), ("naive", "loss"), ("unsynced", "loss"), ("unsynced_names", "loss"), ("two_renames", "kill")],
)
def test_the_sweep_catches_wrong_writers(writer, mode):
    table = sweep(writer, previous=True, faults=[(mode, "none")])
    assert any("neither old nor new" in line or "OUT is gone" in line for line in table["corrupt"])


def test_the_messages_of_each_failing_call():
    """The words of row 46 and 47 where the disk is full and where it does not confirm."""
    told = {}
    for name, number, patched in (("full", 28, "pwrite"), ("sync", 5, "fsync")):
        code = f"""
import os
from unittest import mock
from efficli.errors import EffiError
def fail(*arguments):
    raise OSError({number}, os.strerror({number}))
out = Path(sys.argv[1])
writers.toy(out, "old")
try:
    with mock.patch.object(os, {patched!r}, fail):
        writers.toy(out, "new")
except EffiError as error:
    print(error.line, error.exit_code, file=sys.stderr)
"""
        with tempfile.TemporaryDirectory() as folder:
            told[name] = run(code, Path(folder) / "out")[1].strip()
    assert told["full"] == "cannot write out.lock: no space left 1"
    assert told["sync"] == "model.gguf: not confirmed on disk (the device reports an error) (previous artifact kept) 1"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(tmp_path, seed):
    """50 moments each: kill -9 from outside, wherever the process happens to be."""
    moments = random.Random(seed)
    out = tmp_path / "out"
    writers.toy(out, "old")
    states = {"old": fingerprint(out)}
    writers.toy(tmp_path / "sample", "new")
    states["new"] = fingerprint(tmp_path / "sample")
    for state in states.values():
        del state["run.json"]
    for _ in range(50):
        with start(
            "while True:\n    writers.toy(Path(sys.argv[1]), 'old')\n    writers.toy(Path(sys.argv[1]), 'new')", out
        ) as process:
            time.sleep(0.15 + 0.1 * moments.random())
            process.kill()
        content = fingerprint(out)
        content.pop("run.json")
        assert content in states.values()
    writers.toy(out, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sample"]
