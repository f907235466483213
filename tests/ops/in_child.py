"""Functions that test_child.py runs in a child process; each ends in its own way."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path

from efficli.errors import CheckpointError, GateError, MissingExtra
from efficli.progress import Progress


class NarrowGateError(GateError):
    """A subclass that efficli.errors does not know."""


def echo(argument, progress: Progress):
    return {"argument": argument, "pid": os.getpid(), "stdin": sys.stdin.read()}


def report(argument, progress: Progress):
    progress.start("rows", 3, "rows")
    for _ in range(3):
        progress.advance(1)
    progress.note("a fallback")
    progress.finish()
    return


def noisy(argument, progress: Progress):
    os.write(1, b'{"result": "forged"}\n' * 50_000)
    os.write(2, b"x" * 3_000_000)
    print("also from python")
    return "true"


def fail(argument, progress: Progress):
    if argument == "extra":
        raise MissingExtra("llama-cpp-python", "gguf")
    if argument == "subclass":
        raise NarrowGateError("too far")
    raise CheckpointError("is not a model", hint="look at it", where="config.json:12")


def bug(argument, progress: Progress):
    return {}["no such key"]


def not_json(argument, progress: Progress):
    return object()


def leave(argument, progress: Progress):
    os._exit(argument)


def die(number, progress: Progress):
    print("loading the tensors")
    print("GGML_ASSERT(n > 0) failed", flush=True)
    os.kill(os.getpid(), number)


def null_pointer(argument, progress: Progress):
    ctypes.string_at(0)


def eat_memory(argument, progress: Progress):
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    return len(bytearray(1 << 31))


def sleep(pid_file, progress: Progress):
    if pid_file:
        part = Path(pid_file + ".part")
        part.write_text(str(os.getpid()))
        part.rename(pid_file)
    time.sleep(60)


def crash_at_exit(argument, progress: Progress):
    import atexit

    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
    return "done"


def leave_noisily(argument, progress: Progress):
    os.write(2, b"x" * 3_000_000)
    os._exit(1)


def plod(argument, progress: Progress):
    """Twice as long as the stall limit of its test, and a sign of life every now and then."""
    progress.start("steps", 8, "steps")
    for _ in range(8):
        time.sleep(argument)
        progress.advance(1)
    return "there"
