"""A child process that stays and answers requests, watched from outside: its memory, its time, its end.

Like `child.py`, for work that is asked for piece by piece. The parent samples /proc/PID/status while it waits, so the
peaks are those of the process that ran the model and not of whoever measured; it kills what exceeds its limits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from efficli.errors import FitError
from efficli.ops.byte_size import binary_bytes
from efficli.ops.child import LOG_BYTES, Relay, answer, death, die_with, find, leave, outcome, settle, spawn
from efficli.ops.process import ProcessMemory, memory_of
from efficli.progress import Progress

_BOOTSTRAP = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from efficli.ops import worker; worker.serve()"
_SAMPLE_S = 0.005
"""Between two looks at the child's memory while it changes: a heap that grows at 2 GB/s is seen within 10 MB."""
_CALM_S = 0.04
"""While it does not change: 200 looks a second took 1.6 % of a core from what is being measured."""
_FAREWELL_S = 5.0
_ECHO_S = 0.5
"""Within which a signal that ended the child has reached us, if it was for us too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a worker may take: bytes of resident memory, and seconds for one request; None is no limit."""

    memory: int | None = None
    files: bool = True
    """Whether pages of files count: a kernel can drop them, a device without room for them reads its card instead."""
    seconds: float | None = None


@dataclass(slots=True)
class Peaks:
    """The largest values seen of a process, in bytes."""

    rss: int = 0
    """The kernel's own high-water mark."""
    anon: int = 0
    file: int = 0


class Server(Protocol):
    """What the function that a worker runs must return: it is called with each request, JSON in, JSON out."""

    def __call__(self, request: Any) -> Any:
        """Answer one request; an EffiError is told to the parent, and the worker goes on."""


class Worker:
    """A fresh interpreter that calls `function` ("module:name") as `name(argument, progress)` and then serves requests.

    The function returns a Server. `what` completes "... while {what}". Errors are those of `run_child`; a memory limit
    that is exceeded is the FitError of memory that ran out, with the figures. After an error that ended the process
    every further request raises it again. A context manager; leaving it ends the process.
    """

    def __init__(
        self, function: str, argument: object, *, what: str, limits: Limits, runtime: str = "llama.cpp"
    ) -> None:
        self.what, self.limits, self.runtime = what, limits, runtime
        self.peaks = Peaks()
        self._log, self._pending, self._notes = bytearray(), bytearray(), list[str]()
        self._seen: ProcessMemory | None = None
        self._pause = _SAMPLE_S
        self._end: BaseException | None = None
        self.spawned_ns = time.monotonic_ns()
        self._process, self._reader = spawn(_BOOTSTRAP)
        self._selector = selectors.DefaultSelector()
        assert self._process.stdin and self._process.stdout
        for pipe in (self._process.stdin, self._process.stdout):
            os.set_blocking(pipe.fileno(), False)
        self._selector.register(self._process.stdout.fileno(), selectors.EVENT_READ)
        self._selector.register(self._reader, selectors.EVENT_READ)
        try:
            self.ask({"function": function, "argument": argument, "parent": os.getpid()}, what=what)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._process.pid

    @property
    def notes(self) -> list[str]:
        """What the child wanted a user to read."""
        return self._notes

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the process; in a hurry where something went wrong."""
        self.close(hurry=error is not None)

    def ask(self, request: object, *, what: str | None = None) -> Any:
        """Send one request and wait for its answer."""
        if self._end is not None:
            raise self._end
        what = what or self.what
        try:
            told = self._converse(json.dumps(request).encode() + b"\n", what)
        except BaseException as error:
            self._kill()
            self._end = error
            raise
        return outcome(told, what)

    def look(self) -> None:
        """Take the child's memory into the peaks."""
        # the number of a process that was waited for may be another's by now
        found = memory_of(self.pid) if self._process.returncode is None else None
        if found is None:
            return
        self._pause = min(2 * self._pause, _CALM_S) if found == self._seen else _SAMPLE_S
        self._seen = found
        peaks = self.peaks
        peaks.rss = max(peaks.rss, found.peak_rss)
        peaks.anon = max(peaks.anon, found.rss_anon + found.rss_shmem)
        peaks.file = max(peaks.file, found.rss_file)

    def close(self, *, hurry: bool = False) -> None:
        """End the process and close every descriptor; more than once does no harm."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self.look()
        self._process.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0 if hurry else _FAREWELL_S)
        finally:  # an interrupt too
            self._kill()
            self._selector.close()
            os.close(self._reader)
            if self._process.stdout:
                self._process.stdout.close()

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _converse(self, request: bytes, what: str) -> dict[str, Any]:
        """Send a request and return its answer; meanwhile the child is watched."""
        assert self._process.stdin
        requests = self._process.stdin.fileno()
        seconds = self.limits.seconds
        deadline = None if seconds is None else time.monotonic() + seconds
        self._pause = _SAMPLE_S
        self._selector.register(requests, selectors.EVENT_WRITE)
        while True:
            for key, _ in self._selector.select(self._pause):
                if key.fd == requests:
                    request = self._send(request)
                    if not request:
                        self._selector.unregister(requests)
                elif key.fd != self._reader:
                    self._read_log(key.fd)
                elif (told := self._read_answer(what)) is not None:
                    self.look()
                    self._check_memory(what)
                    return told
            self.look()
            self._check_memory(what)
            if deadline is not None and time.monotonic() > deadline:
                raise FitError(
                    f"{what} took more than {seconds:g} s, and was stopped",
                    hint="--time-limit SECONDS gives it longer",
                )

    def _send(self, request: bytes) -> bytes:
        """Write a piece of a request; what is left of it, nothing if the child is dead: its end tells that."""
        assert self._process.stdin
        try:
            return request[os.write(self._process.stdin.fileno(), request) :]
        except BlockingIOError:
            return request
        except BrokenPipeError:
            return b""

    def _check_memory(self, what: str) -> None:
        """FitError if the child has, or for a moment had, more than it may."""
        limit, seen = self.limits.memory, self._seen
        if limit is None or seen is None:
            return
        anon, file = seen.rss_anon + seen.rss_shmem, seen.rss_file if self.limits.files else 0
        if anon + file > limit:
            found = f"{binary_bytes(anon)} of its own and {binary_bytes(file)} of files"
        elif self.limits.files and seen.peak_rss > limit:
            found = f"{binary_bytes(seen.peak_rss)} for a moment"
        else:
            return
        raise FitError(
            f"out of memory while {what}: {found}, the limit is {binary_bytes(limit)}",
            hint="a smaller type, a shorter context (-c), or a larger --memory-limit",
        )

    def _read_log(self, descriptor: int) -> None:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        self._log += data
        del self._log[:-LOG_BYTES]
        if not data:
            self._selector.unregister(descriptor)

    def _read_answer(self, what: str) -> dict[str, Any] | None:
        """The answer, once it is whole; raises what the child's end stands for."""
        data = os.read(self._reader, 1 << 20)
        if not data:
            assert self._process.stdout
            code = self._process.wait()
            with contextlib.suppress(BlockingIOError, OSError):
                self._log += os.read(self._process.stdout.fileno(), LOG_BYTES)
            raise self._end_of(code, what)
        self._pending += data
        told = None
        *lines, self._pending = self._pending.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "note" in message:
                self._notes.append(message["note"])
            elif not message.keys() & {"start", "advance", "finish"}:  # a bar would disturb what is being measured
                told = message
        return told

    def _end_of(self, code: int, what: str) -> BaseException:
        error = death(code, self._log.decode(errors="replace"), what, self.runtime)
        if isinstance(error, KeyboardInterrupt):
            time.sleep(_ECHO_S)  # sent to the whole group, the signal ends this wait
            return FitError(
                f"{what} was ended from outside (signal {-code})",
                hint="guards of the memory, such as earlyoom, do that to the largest process",
            )
        return error


def serve() -> None:
    """The child's whole life: make the server, answer requests until there are no more, leave."""
    descriptor = settle()
    _volunteer()
    relay: Progress = Relay(descriptor)
    requests = sys.stdin.buffer
    first = json.loads(requests.readline())
    die_with(first["parent"])
    server: Server | None = None

    def make() -> None:
        nonlocal server
        server = find(first["function"])(first["argument"], relay)

    assert isinstance(relay, Relay)
    relay.send(answer(make))
    while server is not None and (line := requests.readline()):
        relay.send(answer(functools.partial(server, json.loads(line))))
    leave()


def _volunteer() -> None:
    """Where memory runs out, the kernel should end this process and none of the user's others."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
