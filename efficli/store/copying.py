"""A file out of the store: a clone where the file system has them, else a copy that is hashed on the way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import sys
from pathlib import Path

from efficli.checkpoint.files import Stamp
from efficli.ops.storage import writing
from efficli.progress import Progress
from efficli.store.entry import Damaged, open_file

_FICLONE = 0x40049409  # linux/fs.h
_NO_CLONES = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM)
_SLAB_BYTES = 1 << 20


def copy_file(source: Path, destination: Path, sha256: str, known: Stamp | None, progress: Progress) -> None:
    """Copy to a new file. Cloned only where the source still has the stamp that it had when its hash was checked.

    Errors: Damaged (the copy has another hash), OutputError (cannot be written; exists). Neither leaves a file.
    """
    reader = open_file(source)
    try:
        with writing(destination):
            writer = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with writing(destination):
                try:
                    unchanged = known is not None and Stamp.of(os.fstat(reader)) == known
                    found = sha256 if unchanged and _clone(reader, writer) else _copy(reader, writer, progress)
                finally:
                    os.close(writer)
            if found != sha256:
                raise Damaged(f"sha256 differs in {source.name}")
        except BaseException:
            with contextlib.suppress(OSError):
                destination.unlink()
            raise
    finally:
        os.close(reader)


def _clone(reader: int, writer: int) -> bool:
    """Share the blocks of a file with a new one; False where the file system cannot."""
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(writer, _FICLONE, reader)
    except OSError as error:
        if error.errno not in _NO_CLONES:
            raise
        return False
    return True


def _copy(reader: int, writer: int, progress: Progress) -> str:
    """Copy the bytes; SHA-256 of what was copied."""
    digest = hashlib.sha256()
    while piece := os.read(reader, _SLAB_BYTES):
        digest.update(piece)
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(writer, rest) :]
        progress.advance(len(piece))
    return digest.hexdigest()
