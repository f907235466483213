"""What this machine is: the name of its processor, and the memory that it lets us use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

_NAMES = ("model name", "Model", "Hardware", "cpu model", "uarch")
"""Of /proc/cpuinfo: x86, a Raspberry Pi, older ARM boards, MIPS, RISC-V."""


def cpu_name(proc: Path = Path("/proc")) -> str:
    """What the processor, or its board, calls itself; the architecture where it has no name."""
    found: dict[str, str] = {}
    try:
        text = (proc / "cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), " ".join(value.split()))
    named = next((found[name] for name in _NAMES if found.get(name)), None)
    return named or platform.processor() or platform.machine()  # `processor` starts a process on Linux


def usable_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that a process may fill: the machine's, or its control group's where that is less; or None."""
    try:
        sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (ValueError, OSError):
        sizes = []
    for limit in (cgroup / "memory.max", cgroup / "memory/memory.limit_in_bytes"):
        try:
            text = limit.read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # "max" is no limit
            sizes.append(int(text))
    return min(sizes, default=None)
