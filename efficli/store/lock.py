"""Runs share a store; what removes from it has it alone. The kernel releases the locks of the dead."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from efficli.artifact.temporary import is_running
from efficli.errors import OutputError

FILE = "lock"
"""Its name in the store; it stays, and lists the process ids of runs since the store was last used by one alone."""

_UNLOCKABLE = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def shared(root: Path) -> Iterator[None]:
    """Use the store beside other runs; waits while somebody removes from it. OSError if there can be no lock file."""
    try:
        descriptor = _open(root, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        descriptor = _open(root, os.O_RDONLY)  # a store that is read and not written
    try:
        _share(descriptor)
        yield
    finally:
        with contextlib.suppress(OSError):  # a full disk reports late; the lock is gone either way
            os.close(descriptor)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Have the store alone; OutputError with the process ids if runs use it, OSError if there can be no lock file."""
    descriptor = _open(root, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another efficli run uses the cache{_holders(descriptor)}", where=str(root), hint="wait for it"
            ) from None
        except OSError as error:
            if error.errno not in _UNLOCKABLE:
                raise
            raise OutputError(
                "its file system has no locks, which would tell whether a run uses the cache",
                where=str(root),
                hint="remove the folder when no run uses it",
            ) from None
        yield
    finally:
        os.close(descriptor)


def _open(root: Path, flags: int) -> int:
    path = root / FILE
    descriptor = os.open(path, flags | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OutputError("is not the lock of a cache", where=str(path), hint="set EFFICLI_CACHE_DIR to another folder")


def _share(descriptor: int) -> None:
    """Lock it beside others, and write down who does; the first to come forgets those before it."""
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        # without locks the entries still appear whole; only removing them is refused
        if error.errno not in _UNLOCKABLE:
            raise
    with contextlib.suppress(OSError):  # for a message only
        os.write(descriptor, b"%d\n" % os.getpid())


def _holders(descriptor: int) -> str:
    """` (pid 123)` or ` (pids 123, 456)`: who of those in the file is alive."""
    words = os.pread(descriptor, 1 << 16, 0).split()
    pids = sorted({int(word) for word in words if word.isdigit() and len(word) < 12})
    living = [str(pid) for pid in pids if is_running(pid)]
    if not living:
        return ""
    return f" (pid{'s' if len(living) > 1 else ''} {', '.join(living)})"
