"""How fast this machine's memory is, and how fast llama.cpp decodes from it: measured, several times each.

Memory is read with memchr(3) for a byte that is not there, and copied with memmove(3): the C library's own vector code.
ctypes drops the GIL in both, so threads read side by side. `decode` runs in a child process (`ops.child`).
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from efficli.ops.llama_clock import LlamaClock
from efficli.ops.llama_model import LlamaModel, StockContext
from efficli.ops.memory import naming_memory
from efficli.ops.statistics import estimate
from efficli.progress import Progress

LEAST, MOST, PATIENCE_S, SPREAD = 7, 25, 5.0, 0.03
"""Repeats at least; more, but not these many or for longer, until the median is known to this share."""
_FILL, _ABSENT = 1, 0
"""What the buffers hold (pages that were never written are all one page of zeros), and what is looked for."""


def repeated(
    measure: Callable[[], float], *, least: int = LEAST, most: int = MOST, patience_s: float = PATIENCE_S
) -> tuple[float, ...]:
    """`measure` again and again, after one run that does not count, until its median is known."""
    measure()
    begin, found = time.monotonic(), [measure() for _ in range(least)]
    while len(found) < most and time.monotonic() - begin < patience_s and estimate(found).spread > SPREAD:
        found.append(measure())
    return tuple(found)


def copy_gb_per_s(nbytes: int) -> tuple[float, ...]:
    """10^9 bytes a second that one thread copies from a buffer of `nbytes` to another; bytes copied count once."""
    with naming_memory("measuring the memory"), _filled(nbytes) as source, _filled(nbytes) as sink:

        def measure() -> float:
            begin = time.perf_counter()
            ctypes.memmove(sink, source, nbytes)
            return nbytes / (time.perf_counter() - begin) / 1e9

        return repeated(measure)


def read_gb_per_s(nbytes: int, threads: int) -> tuple[float, ...]:
    """10^9 bytes a second that `threads` threads together read, each its own part of a buffer of `nbytes`."""
    find = ctypes.CDLL(None).memchr
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    part = nbytes // threads
    with naming_memory("measuring the memory"), _filled(part * threads) as address:

        def read(number: int, ready: threading.Barrier) -> None:
            ready.wait()
            find(address + number * part, _ABSENT, part)

        def measure() -> float:
            ready = threading.Barrier(threads + 1)
            workers = [threading.Thread(target=read, args=(number, ready)) for number in range(threads)]
            for worker in workers:
                worker.start()
            ready.wait()
            begin = time.perf_counter()
            for worker in workers:
                worker.join()
            return part * threads / (time.perf_counter() - begin) / 1e9

        return repeated(measure)


@contextmanager
def _filled(nbytes: int) -> Iterator[int]:
    """The address of a buffer whose pages are all there."""
    memory = mmap.mmap(-1, nbytes)
    held = (ctypes.c_char * nbytes).from_buffer(memory)
    try:
        ctypes.memset(held, _FILL, nbytes)
        yield ctypes.addressof(held)
    finally:
        del held
        memory.close()


def decode(argument: dict[str, Any], progress: Progress) -> dict[str, list[float]]:
    """Seconds that llama.cpp takes for a token of the file `path`, for each count in `threads`, several times.

    Each repeat writes `tokens` tokens into an empty cache and counts the fastest: what else runs on the machine only
    adds, most of all where threads wait for each other. The context is as llama.cpp's own tools open it. For a child
    process.
    """
    found: dict[str, list[float]] = {}
    for threads in argument["threads"]:
        # a context each: the threads of the one before would wait beside
        with LlamaModel(argument["path"], ctx=64, threads=threads, stock=StockContext()) as file:
            clock = LlamaClock(file)
            found[str(threads)] = list(repeated(partial(_token_seconds, clock, int(argument["tokens"]), threads)))
            clock.close()
    return found


def _token_seconds(clock: LlamaClock, tokens: int, threads: int) -> float:
    return min(clock.generate(tokens, depth=0, threads=threads)) / 1e9
