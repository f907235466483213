"""What every benchmark records: the class of machine, versions, and the CPU seconds and peak memory of a command."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from importlib import metadata
from pathlib import Path


def measure(
    command: list[str], *, log: Path, environment: dict[str, str] | None = None, memory: bool = False
) -> dict[str, float]:
    """Run a command: CPU seconds (user, sys) of its processes, wall seconds; `memory`: peak RSS of the largest of them.

    Linux counts what a process was before its exec, a copy of this one, into its peak: it tells nothing of a command
    that stays below this process's own peak. SystemExit then, and where the command fails.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with log.open("ab") as out:
        out.write(f"$ {' '.join(command)}\n".encode())
        out.flush()
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **(environment or {})})
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}, see {log}")
    found = {
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
        "user_s": round(usage.ru_utime, 3),
        "sys_s": round(usage.ru_stime, 3),
        "wall_s": round(wall, 3),
    }
    if memory and usage.ru_maxrss <= own:
        raise SystemExit(f"{' '.join(command)}: its peak memory is hidden by this process's {own} KiB")
    return {**found, "peak_rss_bytes": usage.ru_maxrss * 1024} if memory else found


class Others:
    """The CPU time that processes other than this one and its children take, from here on."""

    def __init__(self) -> None:
        self._began = time.monotonic(), busy_seconds(), own_seconds()

    def cores(self) -> float:
        """Mean number of cores that they kept busy since; a child counts as ours once it was waited for."""
        wall, busy, own = self._began
        return max(0.0, (busy_seconds() - busy - own_seconds() + own) / (time.monotonic() - wall))


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have taken: user, nice, system and interrupts, not steal."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def describe() -> dict[str, object]:
    """The class of machine, without its name."""
    flags: set[str] = set()
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            model = value.strip()
        elif name.strip() in ("flags", "Features"):
            flags = set(value.split())
    shown = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "sha_ni", "asimd", "asimddp", "sve")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "features": [flag for flag in shown if flag in flags],
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def versions(*packages: str) -> dict[str, str]:
    """Installed versions."""
    return {package: metadata.version(package) for package in packages}
