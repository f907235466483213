"""What the CPUs that we may use have done: idle and stolen time, frequency, and who held them back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")

BOARD_FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
"""Of a Raspberry Pi's firmware, from bit 0: now; from bit 16: since the bit was last cleared."""
_SINCE = 16


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Sums over CPUs since boot; seconds."""

    idle: float
    """Including waiting for a device. Linux keeps it exactly, where it samples busy time at each tick."""
    stolen: float
    """The hypervisor ran something else while a CPU of ours had work."""


@dataclass(frozen=True, slots=True)
class Processors:
    """Reads /proc and /sys for a set of CPUs; None or nothing for what they do not tell."""

    proc: Path
    sys: Path
    cpus: frozenset[int]
    """Numbers of the CPUs that this process may use: /proc/stat of a container may be that of the whole host."""
    _frequencies: tuple[tuple[Path, int], ...] = field(init=False)
    _quotas: tuple[Path, ...] = field(init=False)
    _board: Path | None = field(init=False)

    def __post_init__(self) -> None:
        # frozen: the files are looked for once, and read often
        object.__setattr__(self, "_frequencies", tuple(self._frequency_files()))
        object.__setattr__(self, "_quotas", tuple(self._quota_files()))
        found = sorted(self.sys.glob("devices/platform/soc*/*firmware/get_throttled"))
        object.__setattr__(self, "_board", found[0] if found else None)

    def times(self) -> CpuTimes | None:
        """Idle and stolen time of the CPUs, all those of `cpus` together."""
        text = _text(self.proc / "stat")
        if text is None:
            return None
        idle = stolen = 0
        missing = set(self.cpus)
        for line in text.split("\n", len(self.cpus) + 4096):
            if not line.startswith("cpu"):
                break
            name, *fields = line.split()
            if name == "cpu" or int(name[3:]) not in missing:
                continue
            missing.remove(int(name[3:]))
            idle += int(fields[3]) + int(fields[4])
            stolen += int(fields[7]) if len(fields) > 7 else 0
        return None if missing else CpuTimes(idle / _TICKS, stolen / _TICKS)

    def frequency(self) -> float | None:
        """Frequency of the CPU that is nearest to its hardware's maximum, as a share of that."""
        shares = [now / top for path, top in self._frequencies if (now := _number(path))]
        return max(shares, default=None)

    def throttled(self) -> int | None:
        """Periods in which a CPU quota of our control groups stopped someone; None where there is no quota."""
        counts = [count for path in self._quotas if (count := _field(path, "nr_throttled")) is not None]
        return sum(counts) if counts else None

    def board(self) -> int:
        """The firmware's flags, bits as in BOARD_FLAGS; 0 where there is no such firmware."""
        text = _text(self._board) if self._board else None
        return int(text, 16) if text else 0

    def load1(self) -> float | None:
        """Mean number of threads that ran or wanted to over the last minute."""
        text = _text(self.proc / "loadavg")
        return float(text.split()[0]) if text else None

    def _frequency_files(self) -> Iterator[tuple[Path, int]]:
        """The current frequency of each group of CPUs that change together, and the highest; kHz."""
        for policy in sorted(self.sys.glob("devices/system/cpu/cpufreq/policy*")):
            group = (_text(policy / "affected_cpus") or "").split()
            top = _number(policy / "cpuinfo_max_freq")
            if top and not self.cpus.isdisjoint(map(int, group)) and _number(policy / "scaling_cur_freq"):
                yield policy / "scaling_cur_freq", top

    def _quota_files(self) -> Iterator[Path]:
        """cpu.stat of our control group and of those around it, as far as they can be seen from here."""
        return (group / "cpu.stat" for group in control_groups(self.proc, self.sys, "cpu"))


def control_groups(proc: Path, sys: Path, controller: str) -> Iterator[Path]:
    """Our control groups that `controller` ("cpu") may have settings in, and those around them, as far as seen here."""
    mount = sys / "fs/cgroup"
    for line in (_text(proc / "self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # version 2 has one tree, at the mount itself or beside the trees of version 1
        roots = (mount / controllers, mount / controller) if controllers else (mount, mount / "unified")
        root = next((root for root in roots if (root / "cgroup.procs").exists()), None)
        if root:
            group = root / path.strip("/")
            yield from (at for at in (group, *group.parents) if at.is_relative_to(root))


def allowed() -> frozenset[int]:
    """Numbers of the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def board_flags(before: int, after: int) -> tuple[str, ...]:
    """Names of what the firmware reports now, or has newly noticed since `before`."""
    seen = after | (after & ~before) >> _SINCE
    return tuple(name for bit, name in enumerate(BOARD_FLAGS) if seen >> bit & 1)


def _field(path: Path, name: str) -> int | None:
    """A number of a file of lines "name number"."""
    for line in (_text(path) or "").splitlines():
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    return None


def _number(path: Path) -> int | None:
    """A file that holds one number; None if it holds something else ("<unknown>")."""
    text = (_text(path) or "").strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
