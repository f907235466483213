"""What else happened on the machine while something was measured, in sentences that explain the noise."""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from efficli.ops.process import ThreadTime, cpu_seconds, stat_of, thread_times
from efficli.ops.processors import CpuTimes, Processors, allowed, board_flags

# Measured with llama.cpp on both cores of a machine: a neighbour that takes 0.05 cores costs 4-6 % of the tokens per
# second and makes our threads wait 4.4 %; without one they wait 0.4-2.2 %, mostly for whoever measures them.
OTHERS_CORES, OTHERS_SHARE = 0.05, 0.05
"""Cores that others may use unmentioned: so many, or this share of those that we leave idle if that is more."""
WAITED_SHARE = 0.04
STEAL_SHARE = 0.02
FREQUENCY_DROP = 0.05
STEPS_S = 0.01
"""What the time of a core may be off in a window, as Linux tells it in steps of 10 ms. On two cores, the standard
deviation was 4 ms and the largest excess in 355 windows 3 ms; 14 ms, that is, are three deviations."""
NAMED = 3
WORTH_NAMING = 0.02
"""Neighbours that are named: at most so many, and each uses at least so many cores."""


class Neighbour(NamedTuple):
    """A process that is not ours, and how many cores it used on average since the first start."""

    name: str
    pid: int
    cores: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What happened beside us in `windows` windows; None for what this machine does not tell."""

    seconds: float
    """Sum of the windows."""
    windows: int
    cores: int
    """CPUs that we may use; what follows is about these."""
    own_cores: float | None
    """Mean number of them that our processes used."""
    others_cores: float | None
    """Mean number of them that all others used, the kernel included."""
    waited_share: float | None
    """Of the time in which our threads could have run, how much they waited for a core."""
    steal_share: float | None
    """Of the time in which the cores had work, how much the hypervisor gave to others."""
    frequency_drop: float | None
    """How far the fastest core was below the highest frequency seen, on average over the windows."""
    throttled: int | None
    """Periods in which the CPU quota of our control groups was used up; None where there is no quota."""
    board: tuple[str, ...]
    """What a Raspberry Pi's firmware reported: "under-voltage", "throttled"."""
    load1: float | None
    top: tuple[Neighbour, ...]
    """The busiest others; only looked for when others used more than their threshold."""
    seen_cores: float
    """What all others used that still run and can be seen; 0 if not looked for."""

    @property
    def busy(self) -> bool:
        """Whether others used more than their threshold."""
        return self._beyond(self.others_cores, max(OTHERS_CORES, OTHERS_SHARE * (self.cores - (self.own_cores or 0))))

    @property
    def lines(self) -> tuple[str, ...]:
        """A sentence for each thing beyond its threshold; empty on a quiet machine."""
        return tuple(self._sentences())

    def to_json(self) -> dict[str, Any]:
        """As plain data, with the sentences."""
        values = asdict(self) | {"top": [neighbour._asdict() for neighbour in self.top], "lines": list(self.lines)}
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}

    def _sentences(self) -> Iterator[str]:
        if self.busy:
            yield self._busy_neighbour()
        if (self.waited_share or 0) > WAITED_SHARE and self._beyond(_taken(self.waited_share, self.own_cores), 0):
            wanted = (self.own_cores or 0) + _taken(self.waited_share, self.own_cores)
            ours = ", for each other: more threads than cores" if not self.busy and wanted > self.cores * 1.1 else ""
            yield f"waiting: our threads waited {self.waited_share:.0%} of their time for a core{ours}"
        worked = (self.own_cores or 0) + (self.others_cores or 0)
        if (self.steal_share or 0) > STEAL_SHARE and self._beyond(_taken(self.steal_share, worked), 0):
            yield f"steal time: the hypervisor took {self.steal_share:.0%} of the cores' working time"
        if (self.frequency_drop or 0) > FREQUENCY_DROP:
            yield f"frequency drop: the cores were {self.frequency_drop:.0%} below the highest frequency seen"
        if self.throttled:
            periods = "a period" if self.throttled == 1 else f"{self.throttled} periods"
            yield f"CPU quota: the control group's limit stopped its processes in {periods}"
        if self.board:
            yield f"board: the firmware reports {', '.join(self.board)}"

    def _beyond(self, cores: float | None, limit: float) -> bool:
        """Whether a number of cores is above the limit, and above what the steps of Linux' counters can feign."""
        steps = STEPS_S * math.sqrt(self.windows * self.cores) / self.seconds if self.seconds else math.inf
        return cores is not None and cores > max(limit, steps)

    def _busy_neighbour(self) -> str:
        others = self.others_cores or 0
        known = [f"{name} pid {pid}: {cores:.2f}" for name, pid, cores in self.top]
        if self.seen_cores < others / 2:
            known.append("most of it by processes that have ended or cannot be seen from here")
        load = "" if self.load1 is None else f", load {self.load1:.1f}"
        used = f"{others:.1f}" if others >= 1 else f"{others:.2f}"
        who = f" ({', '.join(known)})" if known else ""
        return f"busy neighbour: other processes used {used} of {self.cores} cores{who}{load}"


@dataclass(frozen=True, slots=True)
class _Reading:
    """One look at the machine."""

    at: float
    cores: CpuTimes | None
    own: Mapping[int, float]
    """CPU seconds of our processes."""
    children: float
    """CPU seconds of our children that have ended and were waited for."""
    threads: Mapping[tuple[int, int], ThreadTime]
    throttled: int | None


@dataclass(slots=True)
class _Sums:
    """Over the windows so far; seconds but for the last."""

    windows: int = 0
    seconds: float = 0.0
    own: float = 0.0
    others: float = 0.0
    stolen: float = 0.0
    ran: float = 0.0
    waited: float = 0.0
    frequency: float = 0.0
    """Share of the hardware's maximum, times the seconds of its window."""
    throttled: int = 0


class Watch:
    """Watches the machine between `start` and `stop`; windows add up, and what happens between them is left out.

    `own_pids` is asked at each start and stop for the processes that do our work; this process and the children that
    it waited for are ours too. One that is named at a stop and not at its start counts from its birth. `proc` and
    `sys` are where the kernel tells of itself. Not for several threads at once.
    """

    def __init__(
        self, own_pids: Callable[[], Iterable[int]], *, proc: Path = Path("/proc"), sys: Path = Path("/sys")
    ) -> None:
        self._own_pids = own_pids
        self._processors = Processors(proc, sys, allowed())
        self._sums = _Sums()
        self._begin: _Reading | None = None
        self._last: _Reading | None = None
        self._first_scan: tuple[float, Mapping[int, float]] | None = None
        self._board_before = 0
        self._board: set[str] = set()
        self._highest = 0.0

    def start(self) -> None:
        """Begin a window."""
        if self._first_scan is None:
            self._first_scan = time.monotonic(), _every_process()
        self._board_before = self._processors.board()
        self._begin = self._read()

    def pause(self) -> None:
        """End the window, without a report: what is cheap of `stop`."""
        if self._begin is None:
            return
        # first: a governor lowers it within milliseconds after the work has ended
        frequency = self._processors.frequency()
        end = self._read()
        self._add(self._begin, end, frequency)
        self._board.update(board_flags(self._board_before, self._processors.board()))
        self._begin, self._last = None, end

    def stop(self) -> Disturbance:
        """End the window if one is open, and say what happened in all windows so far."""
        self.pause()
        sums, last = self._sums, self._last
        seconds = sums.seconds or math.inf
        told = last is not None and last.cores is not None and bool(last.own)
        drop = 1 - sums.frequency / seconds / self._highest if self._highest else None
        worked = sums.own + sums.others + sums.stolen
        found = Disturbance(
            seconds=sums.seconds,
            windows=sums.windows,
            cores=len(self._processors.cpus),
            own_cores=sums.own / seconds if told else None,
            others_cores=max(0.0, sums.others) / seconds if told else None,
            waited_share=sums.waited / (sums.waited + sums.ran) if sums.ran else None,
            steal_share=sums.stolen / worked if told and worked else None,
            frequency_drop=drop,
            throttled=None if last is None or last.throttled is None else sums.throttled,
            board=tuple(sorted(self._board)),
            load1=self._processors.load1(),
            top=(),
            seen_cores=0.0,
        )
        if not found.busy:
            return found
        neighbours = self._neighbours()
        seen = sum(neighbour.cores for neighbour in neighbours)
        return dataclasses.replace(found, top=_busiest(neighbours), seen_cores=seen)

    def _read(self) -> _Reading:
        """The counters, those that must fit together read one after the other."""
        pids = set(self._own_pids())
        threads = {(pid, number): thread for pid in pids for number, thread in thread_times(pid).items()}
        own = {pid: used for pid in pids | {os.getpid()} if (used := cpu_seconds(pid)) is not None}
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        throttled = self._processors.throttled()
        cores = self._processors.times()
        return _Reading(time.monotonic(), cores, own, ended.ru_utime + ended.ru_stime, threads, throttled)

    def _add(self, begin: _Reading, end: _Reading, frequency: float | None) -> None:
        """Add the window between two readings."""
        sums, seconds = self._sums, end.at - begin.at
        sums.windows += 1
        sums.seconds += seconds
        if begin.cores and end.cores:
            idle, stolen = end.cores.idle - begin.cores.idle, end.cores.stolen - begin.cores.stolen
            own = _own_seconds(begin, end)
            sums.stolen += stolen
            sums.own += own
            # may be below 0 by the steps in which time is told: over several windows that evens out
            sums.others += seconds * len(self._processors.cpus) - idle - stolen - own
        for key, thread in end.threads.items():
            before = begin.threads.get(key, ThreadTime(0, 0))
            sums.ran += thread.ran - before.ran
            sums.waited += thread.waited - before.waited
        if frequency is not None:
            sums.frequency += frequency * seconds
            self._highest = max(self._highest, frequency)
        sums.throttled += (end.throttled or 0) - (begin.throttled or 0)

    def _neighbours(self) -> list[Neighbour]:
        """Every process that is not ours, as yet without a name."""
        assert self._first_scan
        since, before = self._first_scan
        own, seconds = {*self._own_pids(), os.getpid()}, time.monotonic() - since
        # one that was not there then counts from its birth
        used = {pid: cpu - before.get(pid, 0) for pid, cpu in _every_process().items() if pid not in own}
        return [Neighbour("", pid, cpu / seconds) for pid, cpu in used.items()]


def _busiest(neighbours: Iterable[Neighbour]) -> tuple[Neighbour, ...]:
    """Those that used most, with their names."""
    first = sorted(neighbours, key=lambda neighbour: neighbour.cores, reverse=True)[:NAMED]
    found = [(stat_of(pid), pid, cores) for _, pid, cores in first if cores >= WORTH_NAMING]
    return tuple(Neighbour(stat.name, pid, cores) for stat, pid, cores in found if stat)


def _taken(share: float | None, left: float | None) -> float:
    """Cores that were taken away, from their share of the whole and the cores that were left."""
    return (left or 0) * (share or 0) / (1 - min(share or 0, 0.99))


def _own_seconds(begin: _Reading, end: _Reading) -> float:
    """CPU time of our processes between two readings, those included that began or ended in between."""
    children = end.children - begin.children
    # what a child of ours had used before the window is part of what it leaves behind when it is waited for
    gone = min(children, sum(used for pid, used in begin.own.items() if pid not in end.own))
    living = sum(used - begin.own.get(pid, 0) for pid, used in end.own.items())
    return living + children - gone


def _every_process() -> dict[int, float]:
    """CPU seconds of every process that can be seen."""
    try:
        with os.scandir("/proc") as entries:
            pids = [int(entry.name) for entry in entries if entry.name.isdecimal()]
    except OSError:  # not Linux
        return {}
    return {pid: used for pid in pids if (used := cpu_seconds(pid)) is not None}
