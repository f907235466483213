"""Signals and closed pipes: the command cleans up within a second and says what became of the output."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from efficli.artifact import read_artifact
from tests.faults import writers
from tests.faults.process import start
from tests.lost_nothing import lost_nothing

# Row 54


GUARDED = """
import os, time
from efficli.artifact import draft
from efficli.interrupt import guard

def body():
    with draft(Path(sys.argv[1]), inputs=[], needs_bytes=0, force=True) as made:
        (made.path / "model.gguf").write_bytes(b"half" * 100_000)
        print("ready", flush=True)
        if sys.argv[2] == "published":
            made.commit({}, {})
        if sys.argv[2] == "child":
            sys.path.insert(0, str(Path(writers.__file__).parents[1] / "ops"))
            from efficli.ops.child import run_child
            run_child("in_child:sleep", None, what="sleeping")
        time.sleep(30)
    return 0

def say(line):
    print(line, file=sys.stderr)

sys.exit(guard(body, say))
"""


def interrupt(out: Path, state: str, numbers: list[int]) -> tuple[int, str, float]:
    """Exit code, stderr and the seconds it took after the first signal."""
    with start(GUARDED, out, state, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        began = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.002)
        _, told = process.communicate(timeout=20)
    return process.returncode, told.decode(), time.monotonic() - began


@pytest.mark.parametrize("state", ["computing", "child"])
@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGINT],
        [signal.SIGTERM],
        [signal.SIGHUP],
        [signal.SIGINT] * 2,
        [signal.SIGINT] * 30,
        [signal.SIGTERM, signal.SIGINT, signal.SIGHUP],
    ],
)
def test_a_signal_cleans_up_and_says_so(tmp_path, state, numbers):
    writers.toy(tmp_path / "out", "old")
    with lost_nothing(tmp_path):
        status, told, seconds = interrupt(tmp_path / "out", state, numbers)
    # signals that arrive together are delivered in the order of their numbers
    assert status in {128 + number for number in numbers}
    assert told == "interrupted; nothing was changed\n"
    assert seconds < 1.0 + 0.1 * len(numbers)


def test_a_signal_after_the_commit_says_that_it_was_published(tmp_path):
    status, told, _ = interrupt(tmp_path / "out", "published", [signal.SIGINT])
    assert (status, told) == (130, f"interrupted; {tmp_path / 'out'} was published\n")
    read_artifact(tmp_path / "out").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_signals_ignored_from_the_start_stay_ignored(tmp_path):
    code = GUARDED.replace("time.sleep(30)", "time.sleep(1)")

    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with start(code, tmp_path / "out", "computing", stdout=subprocess.PIPE, preexec_fn=nohup) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        _, told = process.communicate(timeout=10)
    assert (process.returncode, told) == (0, b"")


def test_a_reader_that_goes_away_is_silent():
    code = """
from efficli.interrupt import guard

def body():
    for number in range(1_000_000):
        print("line", number)
    return 0

sys.exit(guard(body, print))
"""
    with start(code, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == b""
