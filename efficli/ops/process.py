"""What the kernel says of one process, ours or not: memory, CPU time, time spent waiting for a CPU, page faults.

All of it is read from outside and costs the process nothing. Linux tells; elsewhere, and for a process that is gone,
every function here returns None.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NS = 1e-9
_TICKS = os.sysconf("SC_CLK_TCK")
_FIRST_FIELD = 3  # of /proc/PID/stat behind the name, as proc(5) counts


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessMemory:
    """Memory of a process; bytes. Linux counts in batches of pages a CPU, so a part may be some 100 kB off."""

    rss_anon: int
    """Heap, stacks and private copies: what must be there."""
    rss_file: int
    """Pages of files, mapped ones included: the kernel may drop them and read them again."""
    rss_shmem: int
    """Shared memory and tmpfs."""
    peak_rss: int
    """VmHWM: the highest sum of the three since the process began its program."""


@dataclass(frozen=True, slots=True)
class ThreadTime:
    """What a thread has had and not had of a CPU since it began; seconds."""

    ran: float
    waited: float
    """Ready to run while something else did."""


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """The part of /proc/PID/stat that says who a process is and what it has used."""

    name: str
    started: int
    """Clock ticks after boot: tells a process from a later one with the same number."""
    cpu: float
    """Seconds of CPU of all its threads, in steps of a clock tick."""
    major_faults: int


def memory_of(pid: int) -> ProcessMemory | None:
    """Memory of a process as /proc/PID/status has it; about 20 microseconds, so that it can be called often."""
    text = _read(f"/proc/{pid}/status")
    if text is None:
        return None
    begin = text.find(b"\nVmHWM:")
    if begin < 0:  # a process that has ended and is not yet waited for, or a thread of the kernel
        return None
    sizes: dict[bytes, int] = {}
    for line in text[begin + 1 :].split(b"\n", 5)[:5]:
        name, _, value = line.partition(b":")
        sizes[name] = int(value.split()[0]) * 1024
    try:
        return ProcessMemory(
            rss_anon=sizes[b"RssAnon"],
            rss_file=sizes[b"RssFile"],
            rss_shmem=sizes[b"RssShmem"],
            peak_rss=sizes[b"VmHWM"],
        )
    except KeyError:  # Linux before 4.5 does not split it
        return None


def cpu_seconds(pid: int) -> float | None:
    """CPU time of all threads that the process has or had; not that of its children."""
    # the process' CPU clock, as clock_getcpuclockid(3) numbers it: exact, where /proc counts ticks of 10 ms
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)
    found = stat_of(pid)
    return found.cpu if found else None


def waited_seconds(pid: int) -> float | None:
    """How long its living threads were ready to run and had no CPU, summed; None where the kernel does not count."""
    threads = thread_times(pid)
    return sum(thread.waited for thread in threads.values()) if threads else None


def thread_times(pid: int) -> Mapping[int, ThreadTime]:
    """The living threads by their number; empty where the kernel does not count or the process is gone."""
    found = {}
    for number, text in _of_each_thread(pid, "schedstat").items():
        fields = text.split()
        # a kernel that does not count writes zeros
        if fields != [b"0"] * 3:
            found[number] = ThreadTime(int(fields[0]) * NS, int(fields[1]) * NS)
    return found


def is_at_rest(pid: int) -> bool | None:
    """Whether no thread of it runs or wants to; a thread that spins while it waits for others does want to."""
    states = [_fields(text)[0] for text in _of_each_thread(pid, "stat").values()]
    return all(state not in b"RD" for state in states) if states else None


def wait_for_rest(pid: int, seconds: float = 0.5) -> bool:
    """Wait until a process is at rest, or gone; False if it is not after so many seconds."""
    end = time.monotonic() + seconds
    while is_at_rest(pid) is False:
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def ran_on(pid: int, before: Mapping[int, ThreadTime]) -> frozenset[int]:
    """The CPUs that those of its threads had last that have run since `before`, what `thread_times` gave then."""
    ran = {number for number, now in thread_times(pid).items() if number not in before or now.ran > before[number].ran}
    stats = _of_each_thread(pid, "stat")
    return frozenset(int(_fields(text)[39 - _FIRST_FIELD]) for number, text in stats.items() if number in ran)


def confine(pid: int, cpus: Iterable[int]) -> None:
    """Let all its threads run on these CPUs only, as far as the system allows; ended ones are passed over."""
    for number in _of_each_thread(pid, "stat"):
        with contextlib.suppress(OSError):  # a CPU may have gone, and some sandboxes allow no affinity
            os.sched_setaffinity(number, cpus)


def major_faults(pid: int) -> int | None:
    """Page faults of all its threads that had to read a device."""
    found = stat_of(pid)
    return found.major_faults if found else None


def stat_of(pid: int) -> ProcessStat | None:
    """Name, start and use of a process."""
    text = _read(f"/proc/{pid}/stat")
    if not text:
        return None
    # the name is in parentheses, and may hold some itself
    name, _, rest = text.partition(b"(")[2].rpartition(b")")
    fields = rest.split()
    return ProcessStat(
        name=name.decode(errors="replace"),
        started=int(fields[22 - _FIRST_FIELD]),
        cpu=(int(fields[14 - _FIRST_FIELD]) + int(fields[15 - _FIRST_FIELD])) / _TICKS,
        major_faults=int(fields[12 - _FIRST_FIELD]),
    )


def _of_each_thread(pid: int, file: str) -> dict[int, bytes]:
    """What /proc/PID/task/N/FILE says, of the threads that live."""
    try:
        with os.scandir(f"/proc/{pid}/task") as entries:
            numbers = [entry.name for entry in entries]
    except OSError:
        return {}
    return {int(number): text for number in numbers if (text := _read(f"/proc/{pid}/task/{number}/{file}"))}


def _fields(stat: bytes) -> list[bytes]:
    """What follows the name, the state first; the name is in parentheses, and may hold some itself."""
    return stat.rpartition(b")")[2].split()


def _read(path: str) -> bytes | None:
    """A small file of /proc in one go, or None: no such process any more, not ours to see, or no /proc."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(descriptor, 16384)
    except OSError:  # it ended between the two calls
        return None
    finally:
        os.close(descriptor)
