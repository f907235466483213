"""Say what was being done when memory ran out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from efficli.errors import FitError


@contextlib.contextmanager
def naming_memory(what: str) -> Iterator[None]:
    """Turn a MemoryError in the block into the FitError `out of memory while {what}` ("quantizing blk.3")."""
    try:
        yield
    except MemoryError:
        raise out_of_memory(what) from None


def out_of_memory(what: str | None = None) -> FitError:
    """The error for memory that ran out while doing `what`."""
    return FitError(
        f"out of memory while {what}" if what else "out of memory",
        hint="close other programs, raise the memory limit, or use a machine with more memory",
    )
