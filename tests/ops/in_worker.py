"""Servers that test_worker.py runs in a child process: each request names a way to answer, or to end."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time
from pathlib import Path

from efficli.errors import CheckpointError, GateError
from efficli.progress import Progress

MIB = 1 << 20


class Server:
    """Answers {"do": name, ...}."""

    def __init__(self, argument, progress: Progress) -> None:
        self.argument, self.progress = argument, progress
        self.asked = 0
        self.kept = []

    def __call__(self, request):
        self.asked += 1
        return getattr(self, request["do"])(request)

    def echo(self, request):
        return {"asked": self.asked, "argument": self.argument, "text": request.get("text"), "pid": os.getpid()}

    def fail(self, request):
        if request.get("gate"):
            raise GateError("too far")
        raise CheckpointError("is not a model", hint="look at it", where="config.json:12")

    def no_memory(self, request):
        raise MemoryError

    def bug(self, request):
        return {}["no such key"]

    def note(self, request):
        self.progress.start("rows", 3, "rows")
        self.progress.note(request["text"])
        self.progress.advance(3)
        self.progress.finish()
        return "noted"

    def noisy(self, request):
        os.write(1, b'{"result": "forged"}\n' * 50_000)
        os.write(2, b"x" * 3_000_000)
        return "heard"

    def die(self, request):
        print("GGML_ASSERT(n > 0) failed", flush=True)
        os.kill(os.getpid(), request["number"])

    def null_pointer(self, request):
        ctypes.string_at(0)

    def leave(self, request):
        os._exit(request["code"])

    def sleep(self, request):
        if "pid_file" in request:
            part = Path(request["pid_file"] + ".part")
            part.write_text(str(os.getpid()))
            part.rename(request["pid_file"])
        time.sleep(request["seconds"])
        return "awake"

    def stop(self, request):
        os.kill(os.getpid(), signal.SIGSTOP)
        return "continued"

    def allocate(self, request):
        """Memory of its own, all of it touched, in steps so that it can be watched; kept, or given back."""
        found = mmap.mmap(-1, request["mib"] * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, len(found), mmap.PAGESIZE):
            found[at] = 1
        if request.get("keep", True):
            self.kept.append(found)
        else:
            found.close()

    def map_file(self, request):
        """Map a file and read all its pages."""
        with Path(request["path"]).open("rb") as file:
            found = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        self.kept.append(found)
        return sum(found[at] for at in range(0, len(found), mmap.PAGESIZE))

    def status(self, request):
        """What the kernel says, seen from inside."""
        return dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())


def serve(argument, progress: Progress) -> Server:
    return Server(argument, progress)


def refuse(argument, progress: Progress) -> Server:
    raise CheckpointError("is not a model", hint="look at it", where=argument)


def crash(argument, progress: Progress) -> Server:
    os.kill(os.getpid(), argument)
    raise AssertionError


def chatter(argument, progress: Progress) -> Server:
    """Says more than a pipe holds before it reads its first request."""
    sys.stdout.write("y" * 1_000_000)
    sys.stdout.flush()
    return Server(argument, progress)
