"""The folder an artifact is written in: beside its place, locked while its writer lives, removed when it is dead."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from efficli.ops.storage import remove_tree

_TEMPORARY = re.compile(r"\.efficli-tmp-(\d+)-[0-9a-f]{8}")


@contextlib.contextmanager
def temporary_directory(parent: Path) -> Iterator[Path]:
    """A new `.efficli-tmp-<pid>-*` in `parent` with the permissions a user's mkdir would give; gone afterwards."""
    path, descriptor = _make(parent)
    try:
        yield path
    finally:
        remove_tree(path)  # after an exchange this name holds what was replaced
        with contextlib.suppress(OSError):
            os.close(descriptor)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A new folder for this user alone among the system's temporary files; what killed runs left there is removed."""
    parent = Path(tempfile.gettempdir())
    with contextlib.suppress(OSError):
        remove_dead(parent)
    with temporary_directory(parent) as path:
        path.chmod(0o700)
        yield path


def remove_dead(parent: Path) -> None:
    """Remove what runs that were killed have left in `parent`; what a living run writes is locked and stays."""
    for path in sorted(parent.iterdir()):
        found = _TEMPORARY.fullmatch(path.name)
        if found:
            _remove_if_dead(path, int(found[1]))


def unused_name(parent: Path) -> Path:
    """A name for something that is on its way in or out of `parent`; a directory that keeps it is removed as dead."""
    return parent / f".efficli-tmp-{os.getpid()}-{secrets.token_hex(4)}"


def aside_path(out: Path) -> Path:
    """Where the old artifact waits during a replacement in two steps."""
    return out.with_name(f".efficli-old-{hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]}")


def restore_aside(out: Path) -> None:
    """Finish or undo a replacement in two steps that was killed between them; call it under the lock of `out`."""
    aside = aside_path(out)
    if not os.path.lexists(aside):
        return
    if os.path.lexists(out):
        remove_tree(aside)
    else:
        aside.rename(out)


def is_running(pid: int) -> bool:
    """Whether there is a process with this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _make(parent: Path) -> tuple[Path, int]:
    """A new directory and a descriptor that holds its lock."""
    while True:
        path = unused_name(parent)
        try:
            path.mkdir()  # not mkdtemp: this becomes the artifact, and others shall be able to read it
        except FileExistsError:
            continue
        descriptor = None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with contextlib.suppress(_Unlockable):
                _lock(descriptor)
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return path, descriptor
        except (BlockingIOError, FileNotFoundError):
            pass  # another run took it for a dead one before it was locked: it removes it
        except BaseException:
            remove_tree(path)
            if descriptor is not None:
                os.close(descriptor)
            raise
        if descriptor is not None:
            os.close(descriptor)


def _remove_if_dead(path: Path, pid: int) -> None:
    """Remove the directory if its lock is free: its writer is gone. Where there are no locks, its pid tells."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return  # gone meanwhile, not a directory, or somebody else's
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            return
        try:
            _lock(descriptor)
        except BlockingIOError:
            return
        except _Unlockable:
            if is_running(pid):
                return
        remove_tree(path)  # under the lock, so that a writer between mkdir and lock notices
    finally:
        os.close(descriptor)


class _Unlockable(Exception):
    """This file system has no locks for directories."""


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise _Unlockable from error
        raise
