"""One run at a time for each output: a lock beside it that the kernel releases when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from efficli.errors import OutputError
from efficli.ops.storage import write_error, writing

_MARK = b"efficli run, pid "


def lock_path(out: Path) -> Path:
    """Where the lock of `out` is: `OUT.lock`, or a short name where that one would be too long."""
    name = f"{out.name}.lock"
    if len(os.fsencode(name)) > os.pathconf(out.parent, "PC_NAME_MAX"):
        name = f".efficli-{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]}.lock"
    return out.with_name(name)


@contextlib.contextmanager
def hold_lock(out: Path) -> Iterator[None]:
    """Hold the lock of `out`; OutputError with the holder's pid if another run has it. A dead one's is taken over."""
    path = lock_path(out)
    descriptor = _acquire(path, out)
    try:
        with writing(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _MARK + b"%d\n" % os.getpid(), 0)
        yield
    finally:
        # removed while it is held: whoever opened it before sees, once it has the lock, that the name is gone
        with contextlib.suppress(OSError):
            path.unlink()
        with contextlib.suppress(OSError):  # what it holds is of no further use, and the lock is gone either way
            os.close(descriptor)


def _acquire(path: Path, out: Path) -> int:
    """An open descriptor of the lock file at `path`, locked."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise write_error(error, path) from error
        try:
            content = os.pread(descriptor, 100, 0) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b"?"
            # a run that was killed while it wrote the mark left a part of it
            if content[: len(_MARK)] != _MARK[: len(content)]:
                raise OutputError(f"{path} exists and is not a lock of efficli", hint="choose another name with -o")
            _lock(descriptor, out, content)
            if _is_at(path, descriptor):
                return descriptor
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            if isinstance(error, OSError):
                raise write_error(error, path) from error
            raise
        os.close(descriptor)  # its holder removed it between our open and our lock


def _lock(descriptor: int, out: Path, content: bytes) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = content.removeprefix(_MARK).strip().decode(errors="replace")
        holder = f" (pid {pid})" if pid else ""
        raise OutputError(f"another efficli run holds {out}{holder}", hint="wait for it, or use another -o") from None
    except OSError as error:
        # a network file system without locks: the rename is still atomic, only double work is not prevented
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
