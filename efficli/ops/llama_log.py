"""What llama.cpp says: its log, captured as lines instead of printed on the user's terminal.

The library has one log callback for the whole process, so there is one listener, installed on first use and kept
alive until the process ends (a callback that Python has freed would crash the next message).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from efficli.errors import MissingExtra

WARNING, ERROR, CONTINUED = 3, 4, 5  # ggml_log_level of ggml 0.25; 1 is debug, 2 is info
_REMEMBERED = 4000  # lines


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line of the library's log: ggml's level (1 debug ... 4 error) and the text without its line break."""

    level: int
    text: str


@dataclass(slots=True)
class LlamaLog:
    """The log of this process: the last few thousand lines, and lists that want to hear the next ones."""

    lines: deque[LogLine] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    listeners: list[list[LogLine]] = field(default_factory=list)
    callback: Any = None
    _open: tuple[int, str] = (0, "")

    def hear(self, level: int, text: str) -> None:
        """Take one message; messages that end without a line break are joined with what continues them."""
        begun, before = self._open
        level, text = (begun, before + text) if level == CONTINUED or before else (level, text)
        *whole, rest = text.split("\n")
        self._open = (level, rest)
        for one in whole:
            line = LogLine(level, one.rstrip())
            self.lines.append(line)
            for listener in self.listeners:
                listener.append(line)


def llama_cpp(*, stock: bool = False) -> Any:
    """The ctypes bindings of llama.cpp, or MissingExtra; the log is captured from here on.

    Its threads spin for a moment and then sleep where they wait for each other, unless the environment says otherwise.
    As gcc's OpenMP does it, they spin so long that a pico model ran 400 times slower beside another busy program; with
    OMP_WAIT_POLICY=passive, which sleeps at once, the reference decoded 18 times slower on a quiet virtual machine
    (2 cores). `stock`, in the call that loads the library, leaves it as every other program has it, and loads nothing
    beside it: for a benchmark.
    """
    if "llama_cpp" not in sys.modules:
        _load(stock)
    try:
        from llama_cpp import llama_cpp as bindings
    except ImportError as error:
        raise MissingExtra("llama-cpp-python", "gguf") from error
    _listen()
    return bindings


def _load(stock: bool) -> None:
    """Load the library for the first time; one that is not installed is found out afterwards."""
    if stock:
        _load_bindings_alone()
        return
    brief = not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if brief:
        os.environ["GOMP_SPINCOUNT"] = "1000"
    with contextlib.suppress(ImportError):
        importlib.import_module("llama_cpp")
    if brief:  # OpenMP has read it; a child of this process that measures must not inherit it
        del os.environ["GOMP_SPINCOUNT"]


def _load_bindings_alone() -> None:
    """Import llama_cpp.llama_cpp without the package around it, whose high-level interface imports numpy and jinja2.

    With them the process that is measured starts 60 ms later, holds 13 MB more, and decodes 2 to 3 % slower.
    """
    found = importlib.util.find_spec("llama_cpp")
    if found is not None and found.submodule_search_locations is not None:
        package = ModuleType("llama_cpp")
        package.__path__ = list(found.submodule_search_locations)
        package.__spec__ = found
        sys.modules["llama_cpp"] = package
        try:
            importlib.import_module("llama_cpp.llama_cpp")
        except BaseException:
            del sys.modules["llama_cpp"]
            raise


@functools.cache
def _listen() -> LlamaLog:
    """The log of this process; the first call installs the callback."""
    from llama_cpp import llama_cpp as bindings

    log = LlamaLog()

    def hear(level: int, text: bytes, _user_data: object) -> None:
        log.hear(level, text.decode("utf-8", "replace"))

    log.callback = bindings.llama_log_callback(hear)
    bindings.llama_log_set(log.callback, None)
    return log


@contextmanager
def captured_log() -> Iterator[list[LogLine]]:
    """The lines that llama.cpp and ggml log inside the with-block, whichever thread they come from."""
    llama_cpp()
    log, heard = _listen(), list[LogLine]()
    log.listeners.append(heard)
    try:
        yield heard
    finally:
        log.listeners[:] = [other for other in log.listeners if other is not heard]


def recent_log() -> list[LogLine]:
    """The last lines that the library logged in this process."""
    return list(_listen().lines)


_SAYS_NOTHING = ("failed to load model", "failed to load vocab", "failed to initialize", "failed to create context")
_PREFIXES = ("error loading model: ", "error loading vocabulary: ", "check_tensor_dims: ", "error: ")


def complaint(lines: list[LogLine], otherwise: str) -> str:
    """The last line of the log that says what went wrong, without the library's function names.

    Generic lines ("failed to load model") come after the one that matters and are passed over.
    """
    for line in reversed(lines):
        text = line.text
        for prefix in _PREFIXES:
            text = text.rpartition(prefix)[2]
        head, colon, tail = text.partition(": ")
        if colon and head.replace("_", "").replace("~", "").isalnum() and " " not in head:
            text = tail
        if line.level == ERROR and text and not any(generic in text for generic in _SAYS_NOTHING):
            return text.removesuffix(".").strip()
    return otherwise
