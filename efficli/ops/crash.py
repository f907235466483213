"""Say why a C library crashed: the signal, the processor feature behind it, and how to build a library that runs."""

from __future__ import annotations

import signal
from pathlib import Path

from efficli.errors import UnsupportedError

REBUILD = (
    "rebuild it for this processor: scripts/install-llama.sh PYTHON, or "
    'CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python '
    "llama-cpp-python"
)
"""The cure for a library that was compiled for another processor, or for features that this one only announces."""


def crash_error(number: int, what: str, runtime: str, log: str) -> UnsupportedError:
    """The error for a child that died of signal `number` while `what`; `log` is the end of what it printed."""
    line = f"{runtime} crashed (signal {number}) while {what}"
    cause = _cause(number, cpu_features())
    if cause is None:
        cause = _last_words(log)
        hint = "the file may ask for something this version cannot do; nothing was published"
    else:
        hint = REBUILD
    error = UnsupportedError(f"{line}: {cause}" if cause else line, hint=hint)
    if log.strip():
        error.add_note(log.strip())
    return error


def cpu_features() -> frozenset[str]:
    """The feature flags that Linux reports for this processor ("avx512f", "amx_tile", "asimddp"); empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _cause(number: int, features: frozenset[str]) -> str | None:
    """What about the processor explains the signal, if it is a signal that a processor feature can cause."""
    if number == signal.SIGILL:
        return "it was built for instructions that this processor lacks (AVX-512, AVX2 or dotprod)"
    if number == signal.SIGSEGV and features & {"amx_tile", "amx_int8"}:
        return "this processor shows AMX, which a native build cannot use on a virtual machine"
    if number == signal.SIGSEGV:
        return "it may have been built for another processor"
    return None


def _last_words(log: str) -> str | None:
    """The last line that the library itself printed, without the interpreter's report of the crash."""
    own = log.split("Fatal Python error", 1)[0].strip().splitlines()
    return own[-1].strip()[:300] if own else None
