"""Files on disk: durable, renamed in one step, and every failure of writing told in one line."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from efficli.errors import OutputError

CAUSES = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "disk quota exceeded",
    errno.EIO: "the device reports an error",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EFBIG: "larger than the file system or `ulimit -f` allows",
}
"""What a user reads for each error number that writing can meet."""

_ONLY_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # macOS sys/stdio.h


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` (open, write, flush, close) into one OutputError line."""
    try:
        yield
    except OSError as error:
        raise write_error(error, path) from error


def write_file(path: Path, content: bytes | str) -> None:
    """Write a small file; text as UTF-8, with escapes for what a file name held that is no text. OutputError."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with writing(path):
        path.write_bytes(data)


def replace_file(path: Path, content: bytes | str) -> None:
    """Write a small file whole or not at all: beside its place, synced, renamed. OutputError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            write_file(partial, content)
            sync_file(partial)
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_error(error: OSError, path: Path) -> OutputError:
    """The line for an error that writing `path` met; the artifact that was there before is mentioned by `draft`."""
    cause = CAUSES.get(error.errno or 0) or error.strerror or str(error)
    return OutputError(f"cannot write {path.name}: {cause}")


def is_of_writing(error: OSError, folder: Path) -> bool:
    """Whether the error can only come from writing in `folder`, not from reading somewhere else."""
    if error.errno in _ONLY_WRITING:
        return True
    return error.errno in CAUSES and error.filename is not None and folder in Path(str(error.filename)).parents


def sync_file(path: Path) -> None:
    """Wait until the content of the file is on the device; OutputError "not confirmed on disk" otherwise."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves the data in the drive's cache
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            else:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unconfirmed(error, path) from error


def sync_directory(path: Path) -> None:
    """Wait until the names in the directory are on the device; OSError otherwise."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some network and FUSE file systems cannot sync a directory at all: nothing better is to be had there
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def unconfirmed(error: OSError, path: Path) -> OutputError:
    """The line for a file whose content the device did not confirm."""
    cause = CAUSES.get(error.errno or 0) or error.strerror or str(error)
    return OutputError(f"{path.name}: not confirmed on disk ({cause})")


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        status = libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
    elif hasattr(libc, "renamex_np"):
        status = libc.renamex_np(first, second, _RENAME_SWAP)
    else:
        return False
    if status == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def free_bytes(directory: Path) -> int | None:
    """Bytes that this user can still write in the directory's file system; None where it does not tell."""
    told = os.statvfs(directory)
    return told.f_bavail * told.f_frsize if told.f_blocks else None


def is_mount(path: Path) -> bool:
    """Whether something is mounted at `path`, so that it cannot be renamed; bind mounts too where Linux tells."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return path.is_mount()
    # octal escapes for white space and the backslash, as fstab has them
    name = re.sub(rb"[ \t\n\\]", lambda found: b"\\%03o" % found[0][0], os.fsencode(path))
    return any(line.split(b" ")[4] == name for line in lines)


def remove_tree(path: Path) -> bool:
    """Remove a file or a directory with everything in it, also where directories are read-only; True if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            with contextlib.suppress(OSError):
                path.unlink()
            return not os.path.lexists(path)
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        for folder, _, _ in os.walk(path):
            with contextlib.suppress(OSError):
                Path(folder).chmod(0o700)
        shutil.rmtree(path, ignore_errors=True)
    return not path.exists()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off SIGINT, SIGTERM and SIGHUP until the block is done; for the few system calls around a rename."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    caught: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    previous: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # None: a handler that Python did not install and could not put back; SIG_IGN: stays ignored
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                previous[number] = signal.signal(number, remember)
        yield
    finally:
        for replaced, handler in previous.items():
            signal.signal(replaced, handler)
        for late in caught:
            signal.raise_signal(late)


def byte_text(count: int) -> str:
    """A number of bytes for a message: decimal units, as disks are sold ("812 MB")."""
    for unit, size, least in (("GB", 10**9, 10**10), ("MB", 10**6, 10**6), ("kB", 10**3, 10**3)):
        if count >= least:
            return f"{count / size:,.0f} {unit}"
    return f"{count} bytes"
