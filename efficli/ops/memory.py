"""Say what was being done when memory ran out."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from efficli.errors import FitError

WAYS = (MemoryError, OSError, RuntimeError, SystemError)
"""The exceptions among which `is_out_of_memory` chooses."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how Python tells that there is no memory: for objects, for a mapping, or for a thread's stack."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, SystemError):  # there was no memory for the exception that would have said so
        return "without exception set" in str(error) or "without setting an exception" in str(error)
    return isinstance(error, MemoryError) or str(error) == "can't start new thread"


@contextlib.contextmanager
def naming_memory(what: str) -> Iterator[None]:
    """Turn memory that ran out in the block into the FitError `out of memory while {what}` ("quantizing blk.3")."""
    try:
        yield
    except WAYS as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(what) from None


def out_of_memory(what: str | None = None) -> FitError:
    """The error for memory that ran out while doing `what`."""
    return FitError(
        f"out of memory while {what}" if what else "out of memory",
        hint="close other programs, raise the memory limit, or use a machine with more memory",
    )
