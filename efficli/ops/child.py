"""Run a function in a fresh interpreter, so that a crash of a C library becomes one line instead of our death.

The request goes in on the child's stdin as JSON; progress and the answer come back as JSON lines on a descriptor of
their own, so that libraries which print to stdout or stderr do no harm: what they print is kept, bounded, for messages.
The child dies with its parent, also when the parent is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import importlib
import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from efficli import errors
from efficli.errors import EffiError, FitError
from efficli.ops.memory import WAYS, is_out_of_memory, out_of_memory
from efficli.progress import Progress, Silent

LOG_BYTES = 64 * 1024
"""How much of the end of a child's stdout and stderr is kept."""

_BOOTSTRAP = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from efficli.ops import child; child.serve()"
_PR_SET_PDEATHSIG = 1


class ChildError(RuntimeError):
    """The function in the child failed in a way that no user can act on; the text holds the child's traceback."""


def run_child(
    function: str,
    argument: object,
    *,
    what: str,
    timeout_s: float | None = None,
    stall_s: float | None = None,
    progress: Progress | None = None,
    runtime: str = "llama.cpp",
) -> Any:
    """Call `function` ("module:name") as `name(argument, progress)` in a fresh interpreter and return its result.

    `argument` and the result are JSON-able. `what` completes "... while {what}" ("loading model.gguf"). `runtime` is
    the C library that is blamed for a crash. Errors: an EffiError of the child is raised here with its class, hint
    and place; a crash is an UnsupportedError that says what to do; running out of memory or of `timeout_s`, or
    `stall_s` without a sign of progress, a FitError; any other exception a ChildError with the child's traceback.
    """
    request = json.dumps({"function": function, "argument": argument, "parent": os.getpid()}).encode()
    limits = [seconds for seconds in (timeout_s, stall_s) if seconds is not None]
    deadline = time.monotonic() + min(limits) if limits else None
    process, reader = spawn(_BOOTSTRAP)
    talk = _Conversation(process, reader, request, deadline, progress or Silent(), stall_s)
    try:
        talk.hold()
    except TimeoutError:
        if stall_s is not None:
            raise FitError(f"{what} showed no progress for {stall_s:g} s, and was stopped") from None
        raise FitError(f"{what} took more than {timeout_s:g} s") from None
    finally:
        talk.close()
    if talk.answer:
        return outcome(talk.answer, what)
    raise death(talk.process.returncode, talk.log.decode(errors="replace"), what, runtime)


def spawn(bootstrap: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a fresh interpreter on one line of code; its second argument is the descriptor whose other end is returned.

    Its stdin is a pipe, and so are stdout and stderr together.
    """
    reader, writer = _pipe_above_stdio()
    # -P: a file json.py in the user's current directory must not be what the child imports
    interpreter = [sys.executable, "-P", f"-Xutf8={sys.flags.utf8_mode}"]
    try:
        process = subprocess.Popen(
            [*interpreter, "-c", bootstrap, json.dumps(sys.path), str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
        )
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return process, reader


@dataclass(slots=True)
class _Conversation:
    """The parent's side: feeds the request, relays progress, collects the answer and the end of the log."""

    process: subprocess.Popen[bytes]
    reader: int
    request: bytes
    deadline: float | None
    progress: Progress
    stall_s: float | None = None
    answer: dict[str, Any] = field(default_factory=dict)
    log: bytearray = field(default_factory=bytearray)
    _pending: bytearray = field(default_factory=bytearray)

    def hold(self) -> None:
        """Talk until the child closes the answer's descriptor and is gone; TimeoutError after the deadline."""
        assert self.process.stdin and self.process.stdout
        with selectors.DefaultSelector() as selector:
            os.set_blocking(self.process.stdin.fileno(), False)
            os.set_blocking(self.process.stdout.fileno(), False)
            selector.register(self.process.stdin.fileno(), selectors.EVENT_WRITE, self._feed)
            selector.register(self.process.stdout.fileno(), selectors.EVENT_READ, self._read_log)
            selector.register(self.reader, selectors.EVENT_READ, self._read_answer)
            while self.reader in selector.get_map():
                events = selector.select(self._time_left())
                if not events:
                    raise TimeoutError
                for key, _ in events:
                    step: Callable[[], bool] = key.data
                    if not step():
                        selector.unregister(key.fd)
                        if key.data == self._feed:
                            self.process.stdin.close()
        try:
            self.process.wait(self._time_left())
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        self._read_log()

    def close(self) -> None:
        """Kill the child if it still runs, and close every descriptor."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.reader)
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                # what is left of the request cannot be delivered to a dead child
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _time_left(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def _feed(self) -> bool:
        """Write a piece of the request; False when it is all delivered or nobody reads."""
        assert self.process.stdin
        try:
            sent = os.write(self.process.stdin.fileno(), self.request)
        except BrokenPipeError:
            return False
        self.request = self.request[sent:]
        return bool(self.request)

    def _read_log(self) -> bool:
        assert self.process.stdout
        try:
            while data := os.read(self.process.stdout.fileno(), 65536):
                self.log += data
                del self.log[:-LOG_BYTES]
        except BlockingIOError:
            return True
        return False

    def _read_answer(self) -> bool:
        data = os.read(self.reader, 1 << 20)
        self._pending += data
        if b"\n" in data:
            *lines, self._pending = self._pending.split(b"\n")
            for line in lines:
                self._receive(json.loads(line))
        return bool(data)

    def _receive(self, message: dict[str, Any]) -> None:
        if self.stall_s is not None:
            self.deadline = time.monotonic() + self.stall_s
        if "start" in message:
            self.progress.start(*message["start"])
        elif "advance" in message:
            self.progress.advance(message["advance"])
        elif "finish" in message:
            self.progress.finish()
        elif "note" in message:
            self.progress.note(message["note"])
        else:
            self.answer = message


def outcome(answer: dict[str, Any], what: str) -> Any:
    """The child's result, or the error that it told."""
    if "result" in answer:
        return answer["result"]
    if "error" in answer:
        raise _rebuild(answer["error"])
    raise out_of_memory(what)


def death(code: int, log: str, what: str, runtime: str) -> BaseException:
    """The exception that the end of a child stands for which did not answer; `code` is negative for a signal."""
    if code == -signal.SIGKILL:
        return out_of_memory(what)
    if -code in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # sent to the whole process group: the parent's own is on its way
        return KeyboardInterrupt()
    if code < 0:
        from efficli.ops.crash import crash_error  # noqa: PLC0415 (needed only when a child has died)

        return crash_error(-code, what, runtime, log)
    return ChildError(f"the child process failed while {what} (exit code {code}):\n{log.strip()}")


def _rebuild(told: dict[str, Any]) -> EffiError:
    """The child's EffiError as an object of the same class here."""
    kind: type[EffiError] = getattr(errors, told["class"])
    error = kind.__new__(kind)
    EffiError.__init__(error, told["message"], hint=told["hint"], where=told["where"])
    return error


def _pipe_above_stdio() -> tuple[int, int]:
    """A pipe whose two descriptors are above 2, also when the parent was started with stdin or stdout closed."""
    ends = os.pipe()
    raised = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends)
    for end in ends:
        os.close(end)
    return raised[0], raised[1]


# The child's side.


class Relay:
    """A Progress that writes what it is told to the parent, one JSON line each."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def start(self, task: str, total: float, unit: str = "") -> None:
        """Relay the start of a task."""
        self.send({"start": [task, total, unit]})

    def advance(self, amount: float) -> None:
        """Relay progress."""
        self.send({"advance": amount})

    def finish(self) -> None:
        """Relay the end of the task."""
        self.send({"finish": True})

    def note(self, message: str) -> None:
        """Relay a note."""
        self.send({"note": message})

    def send(self, message: dict[str, Any]) -> None:
        """Write one message whole."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]


def serve() -> None:
    """The child's whole life: read the request, call the function, send the answer, leave without clean-up."""
    descriptor = settle()
    request = json.loads(sys.stdin.buffer.read())
    die_with(request["parent"])
    relay = Relay(descriptor)
    relay.send(answer(lambda: find(request["function"])(request["argument"], relay)))
    leave()


def settle() -> int:
    """Prepare this process for its work and return the descriptor that answers go to."""
    descriptor = int(sys.argv[2])
    # Ctrl-C reaches the whole terminal group: the parent decides, and kills this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    faulthandler.enable()
    return descriptor


def find(function: str) -> Callable[..., Any]:
    """The function called "module:name"."""
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def answer(work: Callable[[], Any]) -> dict[str, Any]:
    """Do the work and tell how it ended: a result, an EffiError, no memory. Any other exception passes."""
    try:
        return {"result": work()}
    except EffiError as error:
        known = next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)
        return {"error": {"class": known, "message": error.message, "hint": error.hint, "where": error.where}}
    except WAYS as error:
        if not is_out_of_memory(error):
            raise
        return {"memory": True}


def leave() -> None:
    """End this process at once, successfully."""
    sys.stdout.flush()
    sys.stderr.flush()
    # the answer is out: a library that crashes while it is torn down must not turn it into a failure
    os._exit(0)


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when the parent dies; elsewhere a killed parent leaves its child to finish."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # the parent may have died before the request was read
    if os.getppid() != parent:
        os._exit(1)
