"""What the command does when it is told to stop: clean up, say so in one line, and leave with the usual code."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from efficli.errors import OutputError
from efficli.ops.memory import WAYS, is_out_of_memory, out_of_memory

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_GRACE_S = 1.0
"""Further signals within this time are ignored: people press Ctrl-C twice, and the clean-up is under way."""


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop; as a KeyboardInterrupt it passes every `except Exception`."""

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.number = number


def guard(body: Callable[[], int], say: Callable[[str], None]) -> int:
    """Run a command's `body` and return its exit code; the outermost call of `main`.

    SIGINT, SIGTERM and SIGHUP raise Interrupted in the main thread, so that `with` blocks clean up; then `say` gets
    one line and the code is 130, 143 or 129. Signals that were ignored from the start (nohup) stay ignored. A reader
    of stdout that has gone away (`| head -1`) is silent, code 0. Closed standard descriptors become /dev/null. Memory
    that ran out becomes a FitError.
    """
    try:
        with _raising_signals():
            fill_closed_streams()
            code = body()
            if sys.stdout:
                with writing_stdout():
                    sys.stdout.flush()
            return code
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        became = "; ".join(getattr(error, "__notes__", ())) or "nothing was changed"
        say(f"interrupted; {became}")
        return 128 + number
    except BrokenPipeError:
        discard(1)
        return 0
    except WAYS as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory() from None


@contextlib.contextmanager
def _raising_signals() -> Iterator[None]:
    """Turn the signals that end a command into Interrupted; afterwards as before, or ignored if one came."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers, and only it receives signals
        return
    last = -_GRACE_S

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _GRACE_S:
            last = now
            raise Interrupted(number)

    previous = {}
    leaving = False
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                previous[number] = signal.signal(number, stop)
        yield
    except KeyboardInterrupt:
        leaving = True
        raise
    finally:
        for number, handler in previous.items():
            # a second Ctrl-C between here and the end of the process must not print a traceback
            signal.signal(number, signal.SIG_IGN if leaving else handler)


def fill_closed_streams() -> None:
    """Open /dev/null where stdin, stdout or stderr is closed.

    The next file to be opened would get its number, and what a C library prints would end in an artifact.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


@contextlib.contextmanager
def writing_stdout() -> Iterator[None]:
    """A stdout that takes no more, as on a full disk, is an OutputError; a reader that has gone stays what it is."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        discard(1)
        raise OutputError(f"cannot write to stdout: {os.strerror(error.errno).lower()}") from error


def discard(descriptor: int) -> None:
    """Let what is still to be written to stdout (1) or stderr (2) go nowhere: its reader has gone.

    Without this the interpreter's last flush would complain.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
