"""Processes that run a few lines of Python with the toy writer at hand."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.faults.preload import ROOT


def listen() -> None:
    """What a shell's background job would ignore is heard again; for preexec_fn."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(code: str, *arguments: str | Path, **options) -> subprocess.Popen[bytes]:
    """A Python process that runs `code` with the toy writer at hand."""
    text = (
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom tests.faults import writers\n"
    )
    options.setdefault("stderr", subprocess.PIPE)
    options.setdefault("preexec_fn", listen)
    return subprocess.Popen([sys.executable, "-c", text + code, *map(str, arguments)], **options)


def run(code: str, *arguments: str | Path, **options) -> tuple[int, str]:
    """Exit code and stderr of such a process."""
    with start(code, *arguments, **options) as process:
        _, told = process.communicate(timeout=60)
    return process.returncode, (told or b"").decode()
