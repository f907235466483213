"""Whether a file is in the page cache, and out with it: what tells a cold start from a warm one."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
from pathlib import Path

WINDOW = 1 << 30
"""Bytes that are mapped at a time: a file larger than the address space that we may use can still be looked at."""

_PROT_NONE = 0
_MAP_SHARED = 1
_FAILED = ctypes.c_void_p(-1).value


def drop(path: Path) -> float | None:
    """Drop the file from the page cache; returns the share that is there nonetheless, None where it is not known.

    A page stays if a process has it mapped, and all of them on a file system that is itself memory (tmpfs). OSError if
    the file cannot be opened.
    """
    if sys.platform != "linux":
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # a page that is not yet written cannot be dropped; one that cannot be written shows in the share
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return _resident(descriptor)
    finally:
        os.close(descriptor)


def resident(path: Path) -> float | None:
    """Share of the file's pages that are in the page cache, 0..1, found without touching them; None if not known.

    Not known where there is no Linux, and for a file that is neither ours nor writable: of that one, Linux says
    "all of it" to whoever asks. OSError if the file cannot be opened.
    """
    if sys.platform != "linux":
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _resident(descriptor)
    finally:
        os.close(descriptor)


def _resident(descriptor: int) -> float | None:
    """Count pages with mincore(2), window by window; a mapping that allows no access cannot fault a page in."""
    told = os.fstat(descriptor)
    owned = os.geteuid() in (0, told.st_uid)
    if not owned and not os.access(f"/proc/self/fd/{descriptor}", os.W_OK, effective_ids=True):
        return None
    pages = present = 0
    for offset in range(0, told.st_size, WINDOW):
        length = min(WINDOW, told.st_size - offset)
        vector = _present(descriptor, offset, length)
        if vector is None:
            return None
        pages += len(vector)
        # the lowest bit alone means "resident"; the others are reserved
        present += sum(page & 1 for page in vector) if set(vector) - {0, 1} else vector.count(1)
    return present / pages if pages else 0.0


def _present(descriptor: int, offset: int, length: int) -> bytes | None:
    """A byte a page, 1 for what is in memory; None if the system refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    address = libc.mmap(None, length, _PROT_NONE, _MAP_SHARED, descriptor, offset)
    if address == _FAILED:
        return None
    try:
        vector = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
        return vector.raw if libc.mincore(address, length, vector) == 0 else None
    finally:
        libc.munmap(address, length)
