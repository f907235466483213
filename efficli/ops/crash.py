"""Say why a C library crashed: the signal, the processor feature behind it, and how to build a library that runs."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from efficli.errors import UnsupportedError

REBUILD = (
    "rebuild it for this processor: scripts/install-llama.sh PYTHON, or "
    'CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python '
    "llama-cpp-python"
)
"""The cure for a library that was compiled for another processor, or for features that this one only announces."""


FEATURES = {
    "SSE3": "pni", "SSSE3": "ssse3", "AVX": "avx", "AVX_VNNI": "avx_vnni", "AVX2": "avx2", "F16C": "f16c", "FMA": "fma",
    "BMI2": "bmi2", "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16", "AMX_INT8": "amx_int8", "NEON": "asimd", "FP16_VA": "asimdhp", "DOTPROD": "asimddp",
    "MATMUL_INT8": "i8mm", "SVE": "sve", "SME": "sme",
}  # fmt: skip
"""What llama.cpp calls the instruction sets it was built for -> their flag in /proc/cpuinfo."""

_ASK = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"


def crash_error(number: int, what: str, runtime: str, log: str) -> UnsupportedError:
    """The error for a child that died of signal `number` while `what`; `log` is the end of what it printed."""
    line = f"{runtime} crashed (signal {number}) while {what}"
    if number in (signal.SIGILL, signal.SIGSEGV):
        built_for = built_features() if runtime == "llama.cpp" else frozenset()
        line, hint = f"{line}: {_cause(number, built_for, cpu_features())}", REBUILD
    else:
        line, hint = ": ".join([line, *_last_words(log)]), "the file asks for something that this version cannot do"
    error = UnsupportedError(line, hint=hint)
    if log.strip():
        error.add_note(log.strip())
    return error


def built_features() -> frozenset[str]:
    """The instruction sets that the installed llama.cpp was built for, in its own words; empty if it does not tell."""
    try:
        # not in this process: what crashed the child could end it too
        told = subprocess.run([sys.executable, "-P", "-c", _ASK], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return frozenset()
    return frozenset(re.findall(r"(\w+) = 1", told.stdout))


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


def _cause(number: int, built_for: frozenset[str], features: frozenset[str]) -> str:
    """Which processor feature explains the signal."""
    lacking = sorted(name for name in built_for if FEATURES.get(name, name) not in features and name in FEATURES)
    if lacking and features:
        return f"it was built for {', '.join(lacking)}, which this processor lacks"
    if number == signal.SIGILL:
        return "it was built for instructions that this processor lacks"
    if "AMX_INT8" in built_for:
        return "it was built for AMX, which a virtual machine may announce and not have"
    return "it may have been built for another processor"


def _last_words(log: str) -> list[str]:
    """The last line that the library itself printed, if any, without the interpreter's report of the crash."""
    own = log.split("Fatal Python error", 1)[0].strip().splitlines()
    return [line.strip()[:300] for line in own[-1:]]
