"""Open files of a checkpoint safely: regular files only, nothing outside its folder, and noticed when they change."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from efficli.errors import CheckpointError, SecurityError

_CACHED_REPOSITORY = re.compile(r"(models|datasets)--.+")
_XET_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells one state of a file from the next: size, time of change, inode."""

    size: int
    mtime_ns: int
    inode: int

    @staticmethod
    def of(status: os.stat_result) -> Stamp:
        """The stamp in what stat or fstat returned."""
        return Stamp(status.st_size, status.st_mtime_ns, status.st_ino)


_PLAIN = "a checkpoint is read from plain files: put the file itself there"


def changed(where: str) -> CheckpointError:
    """The error for a file that is not what it was when the run began."""
    return CheckpointError(
        "input changed while reading", where=where, hint="run it again when nothing writes to the checkpoint"
    )


@contextmanager
def open_regular(path: Path, where: str) -> Iterator[tuple[int, Stamp]]:
    """A descriptor for reading a regular file, and its stamp; a FIFO, a device or a folder is an error, at once."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer; it does nothing to a regular file
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError("not found", where=where) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if _is_special(path):
            raise CheckpointError("not a regular file", where=where, hint=_PLAIN) from None
        raise CheckpointError(f"cannot be opened ({reason})", where=where) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a regular file", where=where, hint=_PLAIN)
        yield descriptor, Stamp.of(status)
    finally:
        os.close(descriptor)


def read_bytes(path: Path, where: str, max_bytes: int) -> bytes:
    """All of a regular file that has at most `max_bytes`."""
    with open_regular(path, where) as (descriptor, stamp):
        if stamp.size > max_bytes:
            raise CheckpointError(f"{stamp.size} bytes, expected at most {max_bytes}", where=where)
        data = bytearray(stamp.size)
        if read_exactly(descriptor, memoryview(data), 0) != stamp.size:
            raise changed(where)
    return bytes(data)


def slabs(path: Path, where: str, nbytes: int = 1 << 22) -> Iterator[memoryview]:
    """The bytes of a regular file in pieces of `nbytes`, each gone with the next. CheckpointError if it is cut."""
    with open_regular(path, where) as (descriptor, stamp):
        buffer = memoryview(bytearray(min(nbytes, max(stamp.size, 1))))
        for start in range(0, stamp.size, nbytes):
            part = buffer[: min(nbytes, stamp.size - start)]
            if read_exactly(descriptor, part, start) < len(part):
                raise changed(where)
            yield part


def read_exactly(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from byte `offset` of a file; returns the number of bytes read, less than asked for at its end."""
    done = 0
    while done < len(buffer):
        # one call reads at most 2 GiB
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def single_name(name: str) -> bool:
    """Whether `name` is the plain name of one file: no separator, no `..`, nothing unprintable."""
    return name not in ("", ".", "..") and name.isprintable() and not any(c in name for c in "/\\")


def contained(root: Path, name: str) -> Path:
    """The real path of the file `name` (`a` or `a/b`) of the checkpoint `root`; it need not exist.

    A symbolic link may lead to another file below `root`, or, where `root` is a snapshot of the Hugging Face cache,
    to that cache's blobs. Anything else is a SecurityError.
    """
    if not name or not all(single_name(part) for part in name.split("/")):
        raise SecurityError(f"file name leaves the checkpoint directory: {name!r}", where=root.name)
    home = Path(os.path.realpath(root))
    real = Path(os.path.realpath(home / name))
    if real.is_relative_to(home) or _is_blob_of(home, real):
        return real
    hint = "put the file itself there if it is meant to be part of the checkpoint"
    raise SecurityError(f"leaves the checkpoint directory (it is a link to {real})", where=name, hint=hint)


def _is_blob_of(home: Path, real: Path) -> bool:
    """Whether `home` is <cache>/models--org--name/snapshots/<revision> and `real` a blob of that cache."""
    repository = home.parent.parent
    if home.parent.name != "snapshots" or not _CACHED_REPOSITORY.fullmatch(repository.name):
        return False
    if real.parent == repository / "blobs":
        return True
    # files fetched by Xet may be shared by all repositories of a cache: <cache>/blobs/ab/ab...
    return real.parent.parent == repository.parent / "blobs" and bool(_XET_HASH.fullmatch(real.name))


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode)
