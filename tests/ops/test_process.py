"""What is read of a process from outside is what the process itself knows."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from efficli.ops.process import (
    confine,
    cpu_seconds,
    is_at_rest,
    major_faults,
    memory_of,
    ran_on,
    stat_of,
    thread_times,
    wait_for_rest,
    waited_seconds,
)

MIB = 1 << 20
NO_PID = 2**22 + 1
"""Above the largest number that Linux gives."""


@contextmanager
def python(code: str):
    """A Python that runs `code`; `tell(value)` in it writes a line for us, `wait()` stops until we write one."""
    begin = "import json, sys\ndef tell(value=None): print(json.dumps(value), flush=True)\n"
    begin += "def wait(): sys.stdin.readline()\n"
    process = subprocess.Popen([sys.executable, "-c", begin + code], stdin=-1, stdout=-1, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def told(process):
    return json.loads(process.stdout.readline())


def go_on(process):
    process.stdin.write("\n")
    process.stdin.flush()


def test_memory_is_told_apart_by_what_it_is_made_of(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(64 * MIB))
    code = f"""
import mmap, os
tell(); wait()
heap = bytearray(os.urandom(1)) * (96 << 20); tell(); wait()
file = open({str(file)!r}, 'rb')
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ); sum(mapped[::4096]); tell(); wait()
shared = mmap.mmap(-1, 32 << 20); [shared.write(b'x' * 4096) for _ in range(8192)]; tell(); wait()
del heap; tell(); wait()
"""
    seen = []
    with python(code) as process:
        for _ in range(5):
            told(process)
            seen.append(memory_of(process.pid))
            go_on(process)
    start, heap, mapped, shared, freed = seen
    near = 2 * MIB
    assert heap.rss_anon - start.rss_anon == pytest.approx(96 * MIB, abs=near)
    assert mapped.rss_file - heap.rss_file == pytest.approx(64 * MIB, abs=near)
    assert mapped.rss_anon == pytest.approx(heap.rss_anon, abs=near)
    assert shared.rss_shmem - mapped.rss_shmem == pytest.approx(32 * MIB, abs=near)
    assert shared.rss_file == pytest.approx(mapped.rss_file, abs=near)
    assert shared.rss_anon - freed.rss_anon == pytest.approx(96 * MIB, abs=near)
    assert freed.peak_rss == pytest.approx(shared.rss_anon + shared.rss_file + shared.rss_shmem, abs=2 * near)
    assert freed.peak_rss > freed.rss_anon + freed.rss_file + freed.rss_shmem + 90 * MIB


def test_the_peak_is_what_getrusage_says():
    ours, theirs = memory_of(os.getpid()).peak_rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # getrusage also remembers the program that this process was before exec
    assert ours <= theirs * 1.02 and ours >= memory_of(os.getpid()).rss_anon


def test_cpu_time_is_what_the_process_itself_counts():
    code = "import time, threading\ndef burn():\n    while time.thread_time() < 0.1: pass\n"
    code += "threads = [threading.Thread(target=burn) for _ in range(2)]\n[t.start() for t in threads]\n"
    code += "[t.join() for t in threads]\ntell(time.process_time()); wait()"
    with python(code) as process:
        own = told(process)
        seen = cpu_seconds(process.pid)
        # both threads have ended, and still count
        assert own >= 0.2
        assert own - 0.001 <= seen <= own + 0.05
        assert stat_of(process.pid).cpu == pytest.approx(seen, abs=0.05)


def test_waiting_for_a_cpu_is_counted():
    # three that want the same CPU: together they wait twice as long as they run
    code = (
        "import os, threading, time\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\ntell()\nwhile True: pass"
    )
    with python(code) as one, python(code) as two, python(code) as three:
        processes = (one, two, three)
        for process in processes:
            told(process)
        before = [(cpu_seconds(p.pid), waited_seconds(p.pid)) for p in processes]
        time.sleep(0.6)
        after = [(cpu_seconds(p.pid), waited_seconds(p.pid)) for p in processes]
    ran = sum(a[0] - b[0] for a, b in zip(after, before, strict=True))
    waited = sum(a[1] - b[1] for a, b in zip(after, before, strict=True))
    assert waited > 1.5 * ran


def test_threads_are_counted_one_by_one():
    code = (
        "import threading\nthreads = [threading.Thread(target=wait) for _ in range(3)]\n[t.start() for t in threads]\n"
    )
    with python(code + "tell([t.native_id for t in threads])\n[t.join() for t in threads]") as process:
        numbers = told(process)
        assert set(thread_times(process.pid)) == {process.pid, *numbers}


def test_a_read_from_the_device_is_a_major_fault(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(4 * MIB))
    code = f"import mmap, os\nf = open({str(file)!r}, 'rb')\nm = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
    code += "tell(); wait()\nos.fsync(f.fileno()); os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)\n"
    code += "x = sum(m[::4096]); tell(); wait()"
    with python(code) as process:
        told(process)
        before = major_faults(process.pid)
        go_on(process)
        told(process)
        assert major_faults(process.pid) > before


@pytest.mark.parametrize("function", [memory_of, cpu_seconds, waited_seconds, major_faults, stat_of])
def test_a_process_that_is_gone_is_none(function):
    assert function(NO_PID) is None
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    assert function(process.pid) is None


def test_a_process_that_has_ended_and_is_not_waited_for():
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert memory_of(process.pid) is None
        assert cpu_seconds(process.pid) > 0


def test_a_name_may_hold_parentheses_and_spaces():
    with python("open('/proc/self/comm', 'w').write('a) R (1 2'); tell(); wait()") as process:
        told(process)
        assert stat_of(process.pid).name == "a) R (1 2"


def test_a_process_is_told_from_a_later_one_with_its_number():
    with python("tell(); wait()") as process:
        told(process)
        assert stat_of(process.pid).started > stat_of(os.getpid()).started


def test_a_process_is_at_rest_when_none_of_its_threads_wants_to_run():
    """Threads that spin do want to, whether or not they have a core."""
    code = """
import threading
stop = False
def spin():
    while not stop: pass
tell(); wait()
spinning = threading.Thread(target=spin); spinning.start(); tell(); wait()
"""
    with python(code) as process:
        told(process)
        assert wait_for_rest(process.pid, 30)  # it waits for a line
        go_on(process)
        told(process)
        assert [is_at_rest(process.pid) for _ in range(20)].count(False) >= 18
        began = time.monotonic()
        assert not wait_for_rest(process.pid, 0.1)
        assert time.monotonic() - began >= 0.1
    assert is_at_rest(process.pid) is None
    assert wait_for_rest(NO_PID)


def test_rest_is_waited_for():
    code = """
import time
tell()
end = time.monotonic() + 0.2
while time.monotonic() < end: pass
wait()
"""
    with python(code) as process:
        told(process)
        began = cpu_seconds(process.pid)
        assert wait_for_rest(process.pid, 60)
        assert cpu_seconds(process.pid) - began > 0.02
        time.sleep(0.05)
        assert is_at_rest(process.pid)


def test_threads_run_where_they_may_and_are_seen_there():
    code = """
import threading, time
def work():
    while True:
        wait_for_it.wait()
        end = time.process_time() + 0.02
        while time.process_time() < end: pass
        done.release()
wait_for_it, done = threading.Event(), threading.Semaphore(0)
threading.Thread(target=work, daemon=True).start(); tell()
while True:
    wait(); wait_for_it.set(); done.acquire(); wait_for_it.clear(); tell()
"""
    cpus = sorted(os.sched_getaffinity(0))
    with python(code) as process:
        told(process)
        for cpu in (cpus[0], cpus[-1], cpus[0]):
            confine(process.pid, {cpu})
            before = thread_times(process.pid)
            go_on(process)
            told(process)
            assert len(thread_times(process.pid)) == 2
            assert ran_on(process.pid, before) == {cpu}
        assert wait_for_rest(process.pid, 60)
        assert ran_on(process.pid, thread_times(process.pid)) == frozenset()
        confine(process.pid, cpus)
        assert os.sched_getaffinity(process.pid) == set(cpus)
    confine(NO_PID, cpus)
