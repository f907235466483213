"""Time zone, locale, odd names, closed descriptors, changing inputs: the same bytes, or one line."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from efficli.artifact import draft, read_artifact
from efficli.checkpoint import open_checkpoint
from efficli.errors import CheckpointError
from tests.faults import writers
from tests.faults.process import run, start
from tests.lost_nothing import fingerprint
from tests.pico import write_llama

# Row 56: the surroundings


def surroundings(tmp_path: Path) -> dict[str, dict[str, object]]:
    """Options of subprocess for each odd environment, and the name of the output in it."""
    plain = {"PATH": os.environ["PATH"]}
    return {
        "plain": {"env": {**os.environ}},
        "timezone": {"env": {**os.environ, "TZ": "Pacific/Kiritimati"}},
        "ascii": {"env": {**plain, "LANG": "C", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}},
        "no home": {"env": plain},
        "hash seed": {"env": {**os.environ, "PYTHONHASHSEED": "12345"}},
        "name of 255 " + "x" * 243: {"env": {**os.environ}},
        "spaces  and\t'quotes\"": {"env": {**os.environ}},
        os.fsdecode(b"no utf-8 \xff\xfe"): {"env": {**os.environ}},
        "ümläut": {"env": {**plain, "LANG": "C", "LC_ALL": "C"}},
    }


def test_the_surroundings_do_not_change_a_byte(tmp_path):
    seen = {}
    for name, options in surroundings(tmp_path).items():
        assert run("writers.toy(Path(sys.argv[1]), 'new')", tmp_path / name, **options) == (0, "")
        read_artifact(tmp_path / name).verify()
        seen[name] = fingerprint(tmp_path / name)
        del seen[name]["run.json"]
    assert all(content == seen["plain"] for content in seen.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(seen)


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_descriptors(tmp_path, closed):
    """The model's file must not become stdout: a library that prints would print into it."""
    code = """
import ctypes, os
from efficli.interrupt import guard

def body():
    from unittest import mock
    from efficli.artifact import atomic
    libc = ctypes.CDLL(None)
    sync = atomic.sync_file
    def chatty(path):
        with open(path, "rb"):
            libc.puts(b"a library prints"), libc.fflush(None)
            os.write(2, b"another library prints")
            sync(path)
    with mock.patch.object(atomic, "sync_file", chatty):
        writers.toy(Path(sys.argv[1]), "new")
    return 0

sys.exit(guard(body, print))
"""

    def close():
        for descriptor in closed:
            os.close(descriptor)

    with start(code, tmp_path / "out", preexec_fn=close, stdout=subprocess.DEVNULL) as process:
        assert process.wait(timeout=20) == 0
    read_artifact(tmp_path / "out").verify()
    writers.toy(tmp_path / "plain", "new")
    one, other = fingerprint(tmp_path / "out"), fingerprint(tmp_path / "plain")
    del one["run.json"], other["run.json"]
    assert one == other


# Row 57


def test_an_input_that_changes_is_noticed_before_the_commit(tmp_path):
    model = write_llama(tmp_path / "model")
    before = fingerprint(model)
    ckpt = open_checkpoint(model)
    writers.toy(tmp_path / "out", "old")
    old = fingerprint(tmp_path / "out")
    with (
        pytest.raises(CheckpointError, match="input changed while reading"),
        draft(tmp_path / "out", inputs=[model], needs_bytes=0, force=True) as made,
    ):
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")
        ckpt.check_unchanged()
        made.commit({}, {})
    assert fingerprint(tmp_path / "out") == old
    assert fingerprint(model) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
