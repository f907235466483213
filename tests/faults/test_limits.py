"""Full disks, limits, closed directories, no memory, two runs at once: one line each, and nothing lost."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest

from efficli.artifact import draft, writing
from efficli.errors import FitError, OutputError
from efficli.ops import storage
from tests.faults import writers
from tests.faults.process import run, start
from tests.lost_nothing import lost_nothing

# Rows 45 and 46: real limits


def test_needs_more_than_is_free(tmp_path):
    free = storage.free_bytes(tmp_path)
    with (
        lost_nothing(tmp_path),
        pytest.raises(FitError, match="free on"),
        draft(tmp_path / "out", inputs=[], needs_bytes=free + (1 << 40), force=False),
    ):
        pass
    with draft(tmp_path / "out", inputs=[], needs_bytes=free // 2, force=False):
        pass


def test_a_limit_of_the_file_size(tmp_path):
    writers.toy(tmp_path / "out", "old")
    code = """
import resource
from efficli.errors import EffiError
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    writers.toy(Path(sys.argv[1]), "new")
except EffiError as error:
    print(error.line, file=sys.stderr)
    sys.exit(error.exit_code)
"""
    with lost_nothing(tmp_path):
        status, told = run(code, tmp_path / "out")
    allowed = "larger than the file system or `ulimit -f` allows"
    assert (status, told) == (1, f"cannot write model.gguf: {allowed} (previous artifact kept)\n")


def test_a_device_that_is_full():
    with pytest.raises(OutputError, match=r"^cannot write full: no space left$"), writing(Path("/dev/full")):
        Path("/dev/full").write_bytes(b"x")


# Row 48


def test_a_directory_that_is_not_writable():
    """As root the child becomes nobody, so that the system's own answer is asked everywhere."""
    code = """
import os
from efficli.errors import EffiError
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
os.environ["HOME"] = "/nonexistent"
try:
    writers.toy(Path(sys.argv[1]), "new")
except EffiError as error:
    print(error.line, file=sys.stderr)
    sys.exit(error.exit_code)
"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "closed").mkdir()
        writers.toy(folder / "closed" / "out", "old")
        (folder / "closed").chmod(0o555)
        with lost_nothing(folder):
            for out in (folder / "closed" / "out", folder / "closed" / "fresh"):
                status, told = run(code, out, cwd="/")
                assert (status, told) == (1, f"{folder}/closed is not writable\n")
        (folder / "closed").chmod(0o755)


# Rows 51 and 52


HOLD = """
from efficli.artifact import draft
with draft(Path(sys.argv[1]), inputs=[], needs_bytes=0, force=True) as made:
    (made.path / "model.gguf").write_bytes(b"first")
    print("ready", flush=True)
    sys.stdin.read()
    made.commit({}, {})
"""


def test_two_processes_one_output(tmp_path):
    with start(HOLD, tmp_path / "out", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"ready\n"
        with pytest.raises(OutputError, match=rf"another efficli run holds .*/out \(pid {first.pid}\)"):
            writers.toy(tmp_path / "out", "second")
        writers.toy(tmp_path / "neighbour", "second")  # and the living run's temporary directory stays
        first.communicate(timeout=10)
    assert first.returncode == 0
    assert (tmp_path / "out" / "model.gguf").read_bytes() == b"first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["neighbour", "out"]


def test_a_killed_holder_is_succeeded(tmp_path):
    with start(HOLD, tmp_path / "out", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"ready\n"
        first.kill()
    assert (tmp_path / "out.lock").exists()
    writers.toy(tmp_path / "out", "second")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Row 55


def test_memory_that_runs_out_is_one_line(tmp_path):
    code = """
import resource
import numpy as np
from efficli.errors import EffiError
from efficli.interrupt import guard
from efficli.ops.memory import naming_memory
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

def body():
    from efficli.artifact import draft
    with draft(Path(sys.argv[1]), inputs=[], needs_bytes=0, force=True) as made:
        if sys.argv[2] == "named":
            with naming_memory("quantizing blk.3"):
                np.ones(1 << 31)
        np.ones(1 << 31)

try:
    guard(body, print)
except EffiError as error:
    print(error.line, file=sys.stderr)
    sys.exit(error.exit_code)
"""
    for how, words in (("named", "out of memory while quantizing blk.3\n"), ("plain", "out of memory\n")):
        with lost_nothing(tmp_path):
            assert run(code, tmp_path / "out", how) == (4, words)
