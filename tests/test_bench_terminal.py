"""`efficli bench` on a terminal and in a pipe: what it draws, who reads it, and what is left when it is stopped."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from efficli import cli
from tests.faults.process import listen
from tests.tiny_gguf import write_tiny

EFFICLI = [sys.executable, "-m", "efficli"]
QUICK = ["-r", "5", "--max-repetitions", "5", "-t", "1", "--no-starts", "-p", "8", "-n", "4"]
LONG = ["tiny.gguf", "-t", "1", "--no-starts", "-r", "20000", "--max-repetitions", "20000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and half of it."""
    made = tmp_path_factory.mktemp("bench")
    good = write_tiny(made / "tiny.gguf").read_bytes()
    (made / "cut.gguf").write_bytes(good[: len(good) // 2])
    return made


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(("artifacts", "rest", "code", "told"), [
    ("tiny.gguf", "| head -1", 0, "Prefill (reading a prompt), 8 tokens\n"),
    ("tiny.gguf --jsonl", "| head -c 2", 0, '{"'),
    ("cut.gguf tiny.gguf", "| head -c 0", 1, ""),
    ("tiny.gguf", ">&-", 0, ""),
])  # fmt: skip
def test_a_reader_that_leaves_is_silent_and_hides_no_error(artifacts, rest, code, told):
    shell = f"{' '.join(EFFICLI)} bench {artifacts} {' '.join(QUICK)} {rest}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    error = "error: cut.gguf: tensor 'blk.0.ffn_up.weight' ends 896 bytes past the file\n"
    again = "hint: copy or make the whole file again\n"
    assert (done.returncode, done.stdout, done.stderr) == (code, told, error + again if code else "")


def test_the_bar_stands_still_while_something_is_measured():
    """A bar that draws itself ten times a second would use the processor that is being measured."""
    program = "from efficli.console import Terminal as T; import time; t = T(); t.still = {}; t.start('x', 9, 'y'); {}"
    asked = cli.app(["bench", "tiny.gguf"], prog_name="efficli", standalone_mode=False)
    assert asked.terminal.still
    drawn = {}
    for still in (True, False):
        with Screen([sys.executable, "-c", program.format(still, "time.sleep(1)")]) as screen:
            assert screen.process.wait() == 0
        drawn[still] = screen.text().count("0/9")
    assert drawn[True] <= 2 < drawn[False]


class Screen:
    """A command on a terminal of its own, which gets what it writes to stderr; `out` is its stdout."""

    def __init__(self, words: list[str], **environment: str) -> None:
        self.primary, secondary = pty.openpty()

        def lead() -> None:
            listen()
            fcntl.ioctl(secondary, termios.TIOCSCTTY, 0)

        shell = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment}
        self.process = subprocess.Popen(
            words, stdin=secondary, stdout=subprocess.PIPE, stderr=secondary, env=shell, start_new_session=True,
            preexec_fn=lead,
        )  # fmt: skip
        os.close(secondary)
        self.out, self._seen = b"", bytearray()
        self._readers = [threading.Thread(target=self._read_screen), threading.Thread(target=self._read_out)]

    def __enter__(self) -> Screen:
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for reader in self._readers:
            reader.join()
        os.close(self.primary)

    def text(self) -> str:
        """What stands on the screen, its marks left out."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._seen.decode(errors="replace"))

    def wait_for(self, pattern: str) -> None:
        """Until that was on the screen."""
        end = time.monotonic() + 60
        while not re.search(pattern, self.text()):
            assert time.monotonic() < end and self.process.poll() is None, self.text()[-1000:]
            time.sleep(0.005)

    def press_ctrl_c(self) -> None:
        """As a person does: the terminal then signals every process in the foreground."""
        os.write(self.primary, b"\x03")

    def members(self) -> Iterator[int]:
        """Processes of the session."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    yield int(entry.name)

    def _read_screen(self) -> None:
        while True:
            try:
                self._seen += os.read(self.primary, 4096) or b""
            except OSError:  # Linux says EIO when the last writer has gone
                return

    def _read_out(self) -> None:
        self.out = self.process.stdout.read()
        self.process.stdout.close()


@pytest.mark.parametrize("form", ["", "--json"])
def test_ctrl_c_shows_what_was_measured(form):
    with Screen([*EFFICLI, "bench", *LONG, "-p", "64", "-n", "4", *form.split()]) as screen:
        screen.wait_for(r" \d{2,}/40000 repeats")
        assert len(list(screen.members())) == 2
        screen.press_ctrl_c()
        assert screen.process.wait(60) == 130
        assert list(screen.members()) == []
    last = screen.text().replace("\r\n", "\n").rstrip("\n").rpartition("\n")[2]
    assert last.endswith("interrupted; what was measured until then is shown")
    assert "Traceback" not in screen.text()[-5000:]
    out = screen.out.decode()
    if form:
        told = json.loads(out)
        assert told["interrupted"] is True
        assert all(test["n"] >= 4 for test in (one["rate"] for one in told["artifacts"][0]["tests"]))
    else:
        assert out.startswith("Prefill (reading a prompt), 64 tokens\n")
        assert "\ninterrupted: the tables hold what was measured until then\n" in out


@pytest.mark.parametrize("form", ["", "--json"])
def test_ctrl_c_before_anything_was_measured(form):
    with Screen(
        [*EFFICLI, "bench", *LONG, "-c", "60000", "-d", "59000", "-p", "900", "-n", "0", *form.split()]
    ) as screen:
        screen.wait_for("warm-up")
        screen.press_ctrl_c()
        assert screen.process.wait(60) == 130
        assert list(screen.members()) == []
    assert screen.out == b""
    assert screen.text().rstrip().endswith("interrupted; nothing was changed")


def test_colours_are_for_terminals_that_want_them():
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        with Screen([*EFFICLI, "bench", "tiny.gguf", *QUICK], **environment) as screen:
            assert screen.process.wait(60) == 0
        raw = screen._seen.decode()
        assert bool(re.search(r"\x1b\[[0-9;]*3\dm", raw)) is coloured
        assert "\x1b" not in screen.out.decode()
